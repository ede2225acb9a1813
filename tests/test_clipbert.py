"""Tests of clipbert.py: the model, the official checkpoint, training as the authors' code does it, starting weights.
The parts that are exercises, too (grids, visual tokens, [text; grid], clips and their aggregation, losses), have their
tests in test_exercises.py.

The golden_* files hold numbers recorded from the reference implementation (jayleicn/ClipBERT a118b02 on detectron2 and
transformers 2.11.0; CPU, float32): the same weights and inputs must give the same outputs here. Rows of embedding
tables that no recorded input reads are stored as zeros.
"""

import gzip
import json
import math
import re
import zlib
from dataclasses import asdict, replace
from types import SimpleNamespace

import pytest
import torch
import torchvision
from conftest import HERE, SHARED, refused, settings
from safetensors.torch import load, load_file
from torch._subclasses import FakeTensorMode
from torchvision.models.resnet import BasicBlock, Bottleneck
from transformers import BertForPreTraining, BertModel

import clipbert
import data


def unpacked(name):
    return load(gzip.decompress((HERE / name).read_bytes()))


def part(tensors, name):
    """Of {NAME/REST: tensor} those of one name -> {REST: tensor}."""
    return {key.removeprefix(f"{name}/"): value for key, value in tensors.items() if key.startswith(f"{name}/")}


GOLDEN = json.loads((HERE / "golden_clipbert.json").read_text())
TENSORS = unpacked("golden_tensors.safetensors.gz")


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


def close(actual, expected, tolerance):
    torch.testing.assert_close(actual, expected, rtol=0, atol=tolerance)


# The smallest models that still have every part.
TINY = replace(clipbert.ClipBertConfig.tiny(vocab_size=200), hidden_size=32, num_hidden_layers=2, intermediate_size=64)
R50 = replace(clipbert.ClipBertConfig.base(), hidden_size=32, num_hidden_layers=1, num_attention_heads=4, intermediate_size=64, vocab_size=100)


def batch(videos=2, frames=2, texts=1, size=64, length=8, vocab=100):
    """Random frames (B, T, 3, L, L), token ids (B*n, Lt) and a mask under which later texts are shorter."""
    pixels = torch.randint(0, 256, (videos, frames, 3, size, size), dtype=torch.uint8)
    ids = torch.randint(1, vocab, (videos * texts, length))
    lengths = length - torch.arange(videos * texts) % (length - 2)
    return pixels, ids, (torch.arange(length) < lengths[:, None]).long()


def golden(case):
    """A recorded case -> its weights, inputs and outputs, each {name: tensor}."""
    return (part(TENSORS, f"{case}/{kind}") for kind in ("state", "in", "out"))


def on_grids(model, state):
    """A model with recorded weights, every one in its place. It takes grids for frames: the recordings have no CNN."""
    report = clipbert.load_official_checkpoint(model, {f"transformer.{name}": state[name] for name in state})
    assert len(report["loaded"]) + len(report["unused"]) == len(state)
    assert set(report["unused"]) <= {"transformer.bert.visual_embeddings.position_embeddings.weight"}
    assert all(name.startswith("cnn.") for name in report["missing"])
    model.encode_frames = lambda grid: grid
    return model.eval()


def test_transformer_and_loss_match_the_reference():
    """Of a multiple choice: its logits and loss to 1e-5."""
    state, given, expected = golden("multichoice")
    model = on_grids(clipbert.ClipBert(TINY, 1), state)
    # the reference repeats each video for its five options; here it is given once
    p = model(given["visual_inputs_before_repeat"], given["text_input_ids"], given["text_input_mask"])
    close(p.view(2, 5), expected["logits"], 1e-5)
    close(clipbert.video_loss(p, given["labels"], "choice"), expected["loss"].mean(), 1e-5)


def test_transformer_pretraining_heads_match_the_reference():
    """MLM scores of every text position and ITM scores, to 1e-5; the MLM decoder is tied to the word embeddings."""
    state, given, expected = golden("pretrain")
    model = on_grids(clipbert.ClipBertForPreTraining(TINY), state)
    mlm, itm = model(given["visual_inputs"], given["text_input_ids"], given["text_input_mask"])
    close(mlm, expected["mlm_scores"], 1e-5)
    close(itm, expected["itm_scores"], 1e-5)
    assert model.cls.predictions.decoder.weight is model.bert.embeddings.word_embeddings.weight
    assert model.cls.predictions.decoder.bias is model.cls.predictions.bias


def golden_weight(key, shape):
    """The recorded run's weights are not stored but drawn from a seed that is the key's checksum."""
    r = torch.randn(shape, generator=torch.Generator().manual_seed(zlib.crc32(key.encode())))
    fan_in = math.prod(shape[1:])
    if key.endswith(".running_var"):
        return 1 + 0.1 * r.abs()
    if key.endswith((".norm.weight", ".LayerNorm.weight")):
        return 1 + 0.1 * r
    if key.endswith((".running_mean", "bias")):
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
    """The full R-50 + 12-layer model after one forward and one backward pass; its report, and what was computed."""
    state = {key: golden_weight(key, shape) for key, shape in GOLDEN["official_keys"].items()}
    for key, first in GOLDEN["e2e"]["weight_checks"].items():
        close(state[key].flatten()[:3], torch.tensor(first), 1e-6)
    model, seen = clipbert.ClipBert(clipbert.ClipBertConfig.official(), num_outputs=7).eval(), {}
    report = clipbert.load_official_checkpoint(model, state)
    del state
    frames = torch.randint(0, 256, (2, 2, 3, 96, 128), generator=torch.Generator().manual_seed(2021)).float()
    assert frames[..., 0, :].sum() == GOLDEN["e2e"]["image_first_row_sum"]
    model.cnn.register_forward_hook(lambda module, args, out: seen.update(cnn_grid=out))
    model.bert.pooler.register_forward_hook(lambda module, args, out: seen.update(pooled_output=out))
    seen["logits"] = model(frames, TENSORS["e2e/in/text_input_ids"], TENSORS["e2e/in/text_input_mask"])
    seen["loss"] = clipbert.video_loss(seen["logits"], TENSORS["e2e/in/labels"], "answer")
    seen["loss"].backward()
    return SimpleNamespace(model=model, report=report, seen=seen)


def test_official_model_outputs_match_the_reference(official):
    """CNN grid, pooled vector, logits and loss of the full model, to 1e-5 of the largest value (the grid: 2e-5)."""
    assert len(official.seen) == 4
    for name, value in official.seen.items():
        expected = TENSORS[f"e2e/out/{name}"]
        expected = expected.mean() if name == "loss" else expected
        close(value.detach(), expected, (2e-5 if name == "cnn_grid" else 1e-5) * expected.abs().max().item())


def test_official_model_gradients_match_the_reference(official):
    """Their norms from the classifier down to res3, and the norm of all of them (what gradient clipping sees)."""
    parameters = dict(official.model.named_parameters())
    for key, norm in GOLDEN["e2e"]["grad_norms"].items():
        if norm is not None:  # of a parameter that has no gradient there
            gradient = parameters[clipbert.official_name(key)].grad
            assert gradient.norm().item() == pytest.approx(norm, rel=1e-3, abs=1e-6), key
    total = torch.nn.utils.get_total_norm([p.grad for p in official.model.parameters() if p.grad is not None])
    assert total.item() == pytest.approx(GOLDEN["e2e"]["grad_total_norm"], rel=1e-3)


def test_official_checkpoint_every_key_is_accounted_for(official):
    report = official.report
    assert len(report["loaded"]) + len(report["unused"]) == len(GOLDEN["official_keys"]) == 495
    assert sorted(report["unused"]) == sorted(GOLDEN["e2e"]["unused"])
    assert report["missing"] == report["unexpected"] == report["mismatched"] == []
    assert set(report["loaded"]) == set(official.model.state_dict())  # no two keys land in one place


def test_official_frozen_parameters_are_the_references(official):
    """Stem and res2; every BatchNorm is a buffer, so nothing else is frozen."""
    parameters = dict(official.model.named_parameters())
    frozen = {name for name, p in parameters.items() if not p.requires_grad}
    assert frozen == {clipbert.official_name(key) for key in GOLDEN["e2e"]["frozen"]}
    assert all(parameters[name].grad is None for name in frozen)
    # ... and no parameter is there that the forward pass does not use
    assert sum(p.numel() for p in parameters.values()) == GOLDEN["e2e"]["used_in_forward"] == 148_440_775


def test_official_weights_in_a_torchvision_layout_are_refused():
    """The same tensors fit a base() model, and would give wrong features there: strides and channels differ."""
    state = {"cnn.feature.backbone.stem.conv1.weight": torch.zeros(64, 3, 7, 7)}
    for cfg in (TINY, replace(TINY, bgr=True), replace(TINY, caffe_strides=True)):
        with pytest.raises(ValueError, match="official"):
            clipbert.load_official_checkpoint(clipbert.ClipBert(cfg, 1), state)
    with pytest.raises(ValueError, match="no tensor of this file fits"):
        clipbert.copy_weights(torch.nn.Linear(1, 1), state)


def test_golden_schedule():
    for case in GOLDEN["schedule"].values():
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
    decayed, skipped = ([names[p] for p in group["params"]] for group in (decay, skip))
    recorded = GOLDEN["optimizer_groups"]
    assert sorted(decayed) == sorted(clipbert.official_name(key) for key in recorded["decayed"])
    assert len(skipped) == recorded["n_not_decayed"]
    frozen = [clipbert.official_name(key) for key in GOLDEN["e2e"]["frozen"]]
    assert sorted(decayed + skipped + frozen) == sorted(names.values())  # each in one place


def all_twenty():
    """The recorded training in full; in this folder are its first eight steps, with the mean of a clip's frames."""
    folder = SHARED / "golden"
    if not folder.is_dir():
        pytest.skip(f"the 20 steps are too big to copy into tests/, and {folder} is not there")
    rows = json.loads((folder / "trajectory.json").read_text())["cases"]["classification_lse"]["rows"]
    numbers = {name: torch.tensor([row[name] for row in rows], dtype=torch.float64) for name in rows[0]}
    return numbers | part(load_file(folder / "trajectory.safetensors"), "classification_lse")


@pytest.mark.parametrize("steps", [8, 20])
def test_trajectory_of_training_steps_is_the_references(steps):
    """LogSumExp over two clips, clipped gradients, AdamW, warm-up and decay: all that an update is made of."""
    tensors = unpacked("golden_trajectory.safetensors.gz") if steps == 8 else all_twenty()
    assert len(tensors["loss"]) == steps
    start, end = part(tensors, "start"), part(tensors, "end")
    model = on_grids(clipbert.ClipBert(TINY, 7), start)
    optimizer, total = clipbert.build_optimizer(model, weight_decay=1e-3), 20
    for i, (loss, norm, lr) in enumerate(zip(tensors["loss"], tensors["grad_norm"], tensors["lr"], strict=True), 1):
        step = part(tensors, str(i))
        p = clipbert.aggregate_clips(model(step["grid"], step["ids"].long(), step["mask"].long()), "lse")
        ours = clipbert.video_loss(p, step["target"].long(), "answer")
        ours.backward()
        assert ours.item() == pytest.approx(loss.item(), abs=1e-5)
        assert torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0).item() == pytest.approx(norm.item(), abs=1e-4)
        assert clipbert.learning_rate(i, total, 0.002) == lr
        clipbert.set_step(optimizer, i, clipbert.learning_rate(i, total, 0.002))
        optimizer.step()
        optimizer.zero_grad()
    for name in end:
        # A key's bias shifts all scores of a query alike, the last bias all answers of a clip: under a softmax that
        # changes nothing, so they have no true gradient and Adam walks on rounding errors there.
        new = clipbert.official_name(f"transformer.{name}")
        if new and not name.endswith("key.bias") and name != "classifier.2.bias":
            way = (end[name] - start[name]).norm()
            assert (model.state_dict()[new] - end[name]).norm() <= 1e-2 * way, name


BASE = replace(clipbert.ClipBertConfig.base(), num_hidden_layers=2, vocab_size=1000)


@pytest.mark.parametrize("cfg, cells", [(clipbert.ClipBertConfig.tiny(1000), 4), (BASE, 1)], ids=["tiny", "base"])
@torch.no_grad()
def test_init_loss_of_every_head_is_ln_classes(cfg, cells):
    """A new model has no opinion: 5 options, 1540 answers, matching or not, 1000 words; counting starts near zero."""
    inputs = batch(videos=2, texts=5, vocab=1000)
    model = clipbert.ClipBert(cfg, 1)
    scores = [model(*inputs), clipbert.ClipBert(cfg, 1540)(*inputs)]
    if cfg is BASE:  # with BERT's initial scale
        scores += clipbert.ClipBertForPreTraining(cfg)(*inputs)
    assert scores[0].abs().max() < 1
    for p in (scores[0].view(2, 5), *scores[1:]):
        every_label = -p.log_softmax(-1).mean().item()  # cross entropy, each label once for each video
        assert every_label == pytest.approx(math.log(p.shape[-1]), rel=0.05), p.shape
    assert model.bert.embeddings.word_embeddings.weight.std().item() == pytest.approx(cfg.initializer_range, rel=0.1)
    grid = model.encode_frames(inputs[0])
    assert grid.shape[2:4] == (cells, cells) and 0.01 < grid.std() < 1  # it neither vanishes nor explodes


# kind of answer -> G, K, n texts a video
HEADS = {"choice": ("mean", 1, 5), "answer": ("lse", 4, 1), "soft": ("lse", 7, 1), "count": ("max", 1, 1),
         "match": ("lse", 2, 2)}  # fmt: skip


@pytest.mark.parametrize("kind", ["choice", "answer", "count"])
def test_overfit_eight_examples(kind):
    """Noise videos of two clips with any labels: what can learn at all gets eight of them by heart."""
    how, num_outputs, n = HEADS[kind]
    frames, ids, mask = batch(videos=16, frames=1, size=32)
    ids, mask = (x[:8].repeat_interleave(n, dim=0) for x in (ids, mask))
    if kind == "choice":
        ids[:, 1] = torch.arange(10, 10 + n).repeat(8)  # the options of a question differ in one token
    model, target = clipbert.ClipBert(TINY, num_outputs), torch.arange(8) % 4
    optimizer = clipbert.build_optimizer(model)
    for step in range(1, 151):
        clipbert.set_step(optimizer, step, 3e-3)
        p = clipbert.aggregate_clips(model(frames.view(8, 2, 1, 3, 32, 32), ids, mask), how)
        loss = clipbert.video_loss(p, target, kind)
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 5.0)
        optimizer.step()
        if loss < 0.01:
            return
    pytest.fail(f"the loss is still {loss}")


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
    model, frames, kept = clipbert.ClipBert(R50, 1), batch(videos=3, frames=1)[0], []

    def pack(tensor):
        if tensor.ndim == 4 and tensor.shape[0] == 3:
            kept.append(tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor), torch.autocast("cpu", torch.bfloat16):
        model.encode_frames(frames).sum().backward()
    assert kept and {tensor.dtype for tensor in kept} <= {torch.bfloat16, torch.int64}  # int64: of the max-pool
    assert max(tensor.shape[-1] for tensor in kept) == 64 // 4  # res2's output, res3's input; the stem's are larger
    channels = {tensor.shape[1] for tensor in kept if tensor.shape[-1] == 64 // 4}
    assert channels == {256, 128}  # in res2 there are activations of 64 channels: not here


@pytest.mark.parametrize("kind", [*HEADS, "pretraining"])
def test_waste_a_training_step_never_waits_for_the_device(kind):
    """From frames to the update, on tensors that have a shape, but no values: whoever asks for one fails."""
    how, num_outputs, n = HEADS.get(kind, HEADS["match"])
    cfg = replace(TINY, dropout=0.1)
    with FakeTensorMode():
        frames, ids, mask = batch(videos=2, texts=n)
        target = torch.rand(2, 6) if kind == "soft" else torch.randint(2, (4 if n == 2 else 2,))
        labels = torch.where(torch.rand(ids.shape) < 0.3, ids, -100)
        if kind == "pretraining":
            model = clipbert.ClipBertForPreTraining(cfg)
            mlm, itm = model(frames, ids, mask, keep=5)
            loss = clipbert.mlm_loss(mlm, labels) + clipbert.itm_loss(itm, target)
        else:
            model = clipbert.ClipBert(cfg, num_outputs)
            p = clipbert.aggregate_clips(model(frames[:, None], ids, mask), how)
            loss = clipbert.video_loss(p, target, kind)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 5.0)
        optimizer = clipbert.build_optimizer(model)
        clipbert.set_step(optimizer, 1, 1e-3)
        optimizer.step()


# A BERT that agrees with bert-base-uncased in nothing.
SIZES = {"vocab_size": 60, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2,
         "intermediate_size": 48, "hidden_act": "relu", "max_position_embeddings": 40, "layer_norm_eps": 1e-5}  # fmt: skip
SMALL = clipbert.bert_config(replace(clipbert.ClipBertConfig.base(), **SIZES))


@pytest.fixture
def files(tmp_path, monkeypatch):
    """What --resnet FILE and --bert DIR name: torchvision's weights with random statistics, a BERT of another size.

    With four blocks in place of its sixteen, a ResNet-50 has all that it is made of.
    """
    monkeypatch.setitem(clipbert.BACKBONES, "resnet50", (Bottleneck, (1, 1, 1, 1)))
    resnet = torchvision.models.ResNet(Bottleneck, (1, 1, 1, 1)).eval()
    for name, value in resnet.state_dict().items():
        if ".running_" in name or ".bn" in name:
            value.copy_(torch.rand_like(value.float()) + 0.5)
    torch.save(resnet.state_dict(), tmp_path / "torchvision.pth")
    bert = BertForPreTraining(SMALL)
    bert.save_pretrained(tmp_path / "bert")
    words = [*data.SPECIAL_TOKENS, "dog"]
    (tmp_path / "bert" / "vocab.txt").write_text("\n".join(words))
    return SimpleNamespace(resnet=resnet, bert=bert, folder=tmp_path, words=words)


def start(files, build=clipbert.ClipBertForPreTraining, **changes):
    """start_model with these files -> (model, vocabulary)."""
    places = {"resnet": files.folder / "torchvision.pth", "bert": files.folder / "bert"} | changes
    s = settings(model="base", **places)
    return clipbert.start_model(build, s, None, None, lambda: data.read_vocabulary(s.bert))


@pytest.mark.parametrize("layout", ["torchvision", "detectron2"])
def test_start_from_a_cnn_of_either_layout(files, layout):
    """torchvision's computes what it does there; detectron2's is the reference's start, with its pixels and strides."""
    weights, tensors = files.resnet.state_dict(), {"roi_heads.box.weight": torch.ones(1)}
    for key in GOLDEN["official_keys"]:
        name = (clipbert.official_name(key) or "").removeprefix("cnn.resnet.")
        if name in weights:  # of the sixteen blocks four
            tensors[key.removeprefix("cnn.feature.")] = weights[name]
    torch.save(tensors, files.folder / "detectron2.pth")
    model, _ = start(files, resnet=files.folder / f"{layout}.pth")
    for name, value in model.cnn.resnet.state_dict().items():
        assert torch.equal(value, weights[name]), name
    cfg = {"torchvision": clipbert.ClipBertConfig.base, "detectron2": clipbert.ClipBertConfig.official}[layout]()
    assert model.cfg == replace(cfg, **SIZES)
    if layout == "torchvision":
        frames, trunk = torch.randn(1, 3, 64, 64), torch.nn.Sequential(*list(files.resnet.children())[:-2])
        close(model.cnn.resnet(frames), trunk(frames), 1e-4 * trunk(frames).max().item())


def test_start_from_a_bert_of_another_size_sets_the_transformers(files, capsys):
    """Sizes, words and every weight, in pretraining of its MLM head, too; what stays at random is named."""
    model, vocabulary = start(files)
    assert model.cfg == replace(clipbert.ClipBertConfig.base(), **SIZES) and vocabulary == files.words
    own = model.state_dict()
    for name, value in files.bert.state_dict().items():
        assert torch.equal(own[name], value), name
    random = capsys.readouterr().out.split("at random: ")[1].strip().split(", ")
    assert random == ["cnn.grid_encoder", *(name for name in random if name.startswith("visual_embeddings."))]
    _, ids, mask = batch(vocab=60)
    close(model.eval().bert(ids, mask)[0], files.bert.eval().bert(ids, mask)[0], 1e-5)  # with its activation and heads


def test_start_from_a_bert_without_heads_and_of_a_model_without_them(files, capsys):
    """What BERT lacks, pooler or MLM head, stays at random; fine-tuning, which has no such head, leaves it out."""
    BertModel(SMALL, add_pooling_layer=False).save_pretrained(files.folder / "bert")
    start(files)
    out = capsys.readouterr().out.strip().split(", ")
    assert {"bert.pooler", "cls.predictions", "cls.seq_relationship"} <= set(out)
    files.bert.save_pretrained(files.folder / "bert")
    model, _ = start(files, lambda cfg: clipbert.ClipBert(cfg, 3))
    out = capsys.readouterr().out
    assert "classifier.0" in out and "cls." not in out
    close(model.bert.pooler.dense.weight, files.bert.bert.pooler.dense.weight, 0)


@pytest.mark.parametrize("changes, words", [
    ({"num_hidden_layers": 3}, "not a whole BERT"), ({"intermediate_size": 64}, "not a whole BERT"),
    ({"model_type": "roberta"}, "holds a roberta; give a BERT"),
])  # fmt: skip
def test_start_from_a_bert_that_is_not_what_it_says_stops(files, changes, words, caplog):
    """Tensors that are missing or of another shape, another transformer. transformers would print a table besides."""
    config = files.folder / "bert" / "config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | changes))
    assert refused(start, files, error=ValueError).startswith(f"{config.parent}: {words}")
    assert not caplog.records


@pytest.mark.parametrize("other", [(BasicBlock, (1, 1, 1, 1)), (Bottleneck, (1, 1, 2, 1))], ids=["shapes", "depth"])
def test_start_from_another_resnet_stops(files, other):
    path = files.folder / "other.pth"
    torch.save(torchvision.models.ResNet(*other).state_dict(), path)
    line = refused(start, files, error=ValueError, resnet=path)
    assert line.startswith(f"{path}: not a resnet50; give torchvision's resnet50-")


@pytest.mark.parametrize("which", ["resnet", "bert"])
def test_start_without_network_lists_the_choices(files, monkeypatch, which):
    """Whichever download fails, and whatever the hub says about it."""

    def no_network(*args, **kwargs):
        raise TimeoutError("Max retries exceeded\nand more" if which == "bert" else "")

    if which == "bert":
        monkeypatch.setattr(BertForPreTraining, "from_pretrained", no_network)
    monkeypatch.setattr(torchvision.models, "get_model", no_network)
    line = refused(start, files, error=ValueError, resnet=None)
    assert re.search("TimeoutError.*--resnet.*--bert.*--init.*--scratch", line)


def test_start_from_a_checkpoint_of_ours_brings_its_sizes_and_words():
    """Whatever this run's own would be: every field of the configuration, every weight."""
    cfg = replace(TINY, caffe_strides=True, bgr=True, pixel_std=(1.0, 2.0, 3.0), max_position_embeddings=40,
                  hidden_act="relu")
    first = clipbert.ClipBert(cfg, 3)
    state, s = {"config": asdict(cfg), "model": first.state_dict(), "vocabulary": ["a"]}, settings(init="last.pt")
    model, vocabulary = clipbert.start_model(lambda cfg: clipbert.ClipBert(cfg, 3), s, state, None, None)
    assert model.cfg == cfg and vocabulary == ["a"]
    assert all(torch.equal(value, model.state_dict()[name]) for name, value in first.state_dict().items())
