"""Tests of clipbert.py. One component at a time: `pytest tests/test_clipbert.py -k aggregate`, or one of: transformer,
official, loss, schedule, optimizer, init, overfit, invariance, pixels, shared, frozen, waste, checkpoint, pretrained.

`golden_clipbert.json` and `golden_tensors.safetensors.gz` hold numbers recorded from the reference implementation
(jayleicn/ClipBERT a118b02 on detectron2 and transformers 2.11.0; CPU, float32): the same weights and inputs must give
the same outputs here. Rows of embedding tables that no recorded input reads are stored as zeros.
"""

import gzip
import json
import math
import pickle
import sys
import zlib
from dataclasses import asdict, replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
import torchvision
from safetensors.torch import load, load_file
from torch.utils._python_dispatch import TorchDispatchMode
from torchvision.ops import FrozenBatchNorm2d
from transformers import BertModel

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import clipbert

HERE = Path(__file__).resolve().parent
GOLDEN = json.loads((HERE / "golden_clipbert.json").read_text())
TENSORS = load(gzip.decompress((HERE / "golden_tensors.safetensors.gz").read_bytes()))
MORE_TENSORS = HERE.parents[1] / "shared" / "golden" / "transformer_tiny.safetensors"  # the cases too big to copy


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
        if not MORE_TENSORS.exists():
            pytest.skip(f"{case} is too big to copy into tests/, and shared/golden/{MORE_TENSORS.name} is not there")
        tensors = load_file(MORE_TENSORS)
    parts = {"state": {}, "in": {}, "out": {}}
    for name, value in tensors.items():
        if name.startswith(case + "/"):
            _, part, name = name.split("/", 2)
            parts[part][name] = value
    return parts


def golden_model(case, num_outputs):
    """A model with the recorded weights, and the case. Every recorded weight must find its place."""
    g = golden(case)
    model = tiny_model(num_outputs) if num_outputs else clipbert.ClipBertForPreTraining(TINY).eval()
    state = {f"transformer.{name}": value for name, value in g["state"].items()}
    report = clipbert.load_official_checkpoint(model, state)
    assert report.unused == ["transformer.bert.visual_embeddings.position_embeddings.weight"]
    assert len(report.loaded) == len(state) - 1
    assert not report.unexpected and not report.mismatched
    assert all(name.startswith("cnn.") for name in report.missing)
    return model, g


def golden_grid(g, texts_per_video):
    """The reference repeats each video for its n texts; here it is given once."""
    grid = g["in"].get("visual_inputs_before_repeat")
    return g["in"]["visual_inputs"][::texts_per_video] if grid is None else grid


CASES = [("multichoice", 1, 5), ("seqcls", 7, 1), ("seqcls_bce", 7, 1), ("retrieval_ce", 2, 2)]


@pytest.mark.parametrize("case, num_outputs, n", CASES, ids=[case[0] for case in CASES])
def test_transformer_of_each_head_matches_the_reference(case, num_outputs, n):
    """Text embedding, visual embedding, every layer, pooled vector and logits, to 1e-5."""
    model, g = golden_model(case, num_outputs)
    seen = {}
    for i, layer in enumerate(model.bert.encoder.layer):
        layer.register_forward_hook(lambda module, args, out, i=i: seen.update({f"act.layer{i}": out}))
    model.bert.embeddings.register_forward_hook(lambda m, args, out: seen.update({"act.text_embedding_output": out}))
    model.visual_embeddings.register_forward_hook(
        lambda m, args, out: seen.update({"act.visual_embedding_output": out.repeat_interleave(n, 0)})
    )
    model.bert.pooler.register_forward_hook(lambda m, args, out: seen.update({"act.pooled_output": out}))
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
    parameters = dict(model.named_parameters())
    for name, norm in GOLDEN["grad_norms"]["multichoice"].items():
        if norm is not None:
            gradient = parameters[clipbert.official_name(f"transformer.{name}")].grad
            assert gradient.norm().item() == pytest.approx(norm, rel=1e-3, abs=1e-6), name


def test_transformer_multichoice_sharing_a_video_equals_repeating_it():
    model, g = golden_model("multichoice", 1)
    grid, text = golden_grid(g, 5), (g["in"]["text_input_ids"], g["in"]["text_input_mask"])
    close(model.classify(grid, *text), model.classify(grid.repeat_interleave(5, dim=0), *text), 1e-6)


def test_transformer_pretraining_heads_match_the_reference():
    """MLM scores of every text position and ITM scores, to 1e-5."""
    model, g = golden_model("pretrain", None)
    text = g["in"]["text_input_ids"], g["in"]["text_input_mask"]
    hidden, pooled = model.fuse(g["in"]["visual_inputs"], *text)
    mlm, itm = model.cls(hidden[:, : text[0].shape[1]], pooled)
    close(pooled, g["out"]["act.pooled_output"], 1e-5)
    close(mlm, g["out"]["mlm_scores"], 1e-5)
    close(itm, g["out"]["itm_scores"], 1e-5)


def test_transformer_mlm_decoder_is_tied_to_the_word_embeddings():
    model = clipbert.ClipBertForPreTraining(TINY)
    assert model.cls.predictions.decoder.weight is model.bert.embeddings.word_embeddings.weight
    assert model.cls.predictions.decoder.bias is model.cls.predictions.bias
    frames, ids, mask = batch(texts=3)
    mlm, itm = model.eval()(frames, ids, mask, keep=5)
    assert mlm.shape == (6, 8, 200) and itm.shape == (6, 2)


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
    parameters = dict(official["model"].named_parameters())
    for key, norm in GOLDEN["e2e"]["grad_norms"].items():
        gradient = parameters[clipbert.official_name(key)].grad
        assert gradient.norm().item() == pytest.approx(norm, rel=1e-3, abs=1e-6), key
    total = torch.stack([p.grad.norm() for p in parameters.values() if p.grad is not None]).norm().item()
    assert total == pytest.approx(GOLDEN["e2e"]["grad_total_norm"], rel=1e-3)


def test_official_checkpoint_every_key_is_accounted_for(official):
    report = official["report"]
    assert len(report.loaded) + len(report.unused) == len(GOLDEN["official_keys"]) == 495
    assert sorted(report.unused) == sorted(GOLDEN["e2e"]["unused"])
    assert report.missing == report.unexpected == report.mismatched == []
    assert len(set(report.loaded)) == len(report.loaded)  # no two keys land in one place
    assert set(report.loaded) == set(official["model"].state_dict())


def test_official_frozen_parameters_are_the_references(official):
    """Stem and res2; every BatchNorm is a buffer, so nothing else is frozen."""
    frozen = {name for name, p in official["model"].named_parameters() if not p.requires_grad}
    assert frozen == {clipbert.official_name(key) for key in GOLDEN["e2e"]["frozen"]}
    assert all(p.grad is None for p in official["model"].parameters() if not p.requires_grad)


def test_official_parameter_count(official):
    """The paper's model has no parameter that its forward does not use."""
    assert sum(p.numel() for p in official["model"].parameters()) == GOLDEN["e2e"]["used_in_forward"] == 148_440_775


def test_official_checkpoint_of_another_shape_is_reported_not_loaded():
    """A classifier for other answers is reported, unknown names as well; the rest is copied."""
    model = tiny_model(num_outputs=3)
    before = model.classifier[2].weight.clone()
    state = {"transformer.classifier.2.weight": torch.ones(7, 64), "transformer.classifier.0.bias": torch.ones(64)}
    report = clipbert.load_official_checkpoint(model, state | {"transformer.nonsense": torch.ones(1)})
    assert report.loaded == ["classifier.0.bias"] and model.classifier[0].bias.eq(1).all()
    assert report.unexpected == ["nonsense"]
    assert report.mismatched == ["classifier.2.weight: (7, 64), (3, 64)"]
    assert torch.equal(model.classifier[2].weight, before)
    assert "1 mismatched" in str(report) and "(7, 64), (3, 64)" in str(report)


def test_official_weights_in_a_torchvision_layout_warn():
    """The same tensors fit a base() model, and would give wrong features there: strides and channels differ."""
    key = "cnn.feature.backbone.stem.conv1.weight"
    with pytest.warns(UserWarning, match="official"):
        clipbert.load_official_checkpoint(clipbert.ClipBert(R50, 1), {key: torch.zeros(64, 3, 7, 7)})


# ----------------------------------------------------------------------------------------------------------------------
# G and the losses


AGGREGATIONS = GOLDEN["clip_aggregation"]


@pytest.mark.parametrize("case", AGGREGATIONS, ids=[f"{c['case']}-{c['pool']}" for c in AGGREGATIONS])
def test_aggregate_matches_the_reference(case):
    """Pooled logits, loss and the gradient to every clip, also for logits of 80 and 1000: nothing overflows."""
    logits = torch.tensor(case["logits"], requires_grad=True)  # (N, B, K)
    p = clipbert.aggregate_clips(logits, case["pool"])
    loss = clipbert.video_loss(p, torch.tensor(case["labels"]), "answer")
    loss.backward()
    assert p.isfinite().all() and loss.isfinite() and logits.grad.isfinite().all()
    torch.testing.assert_close(loss, torch.tensor(case["loss"]), rtol=1e-5, atol=1e-5)
    expected, gradient = torch.tensor(case["grad_logits"]), logits.grad
    if case["case"] == "identical_clips" and case["pool"] == "max":
        # Equal clips: the reference's gradient goes to one of them, amax shares it out. The sum is the same.
        expected, gradient = expected.sum(0), gradient.sum(0)
    torch.testing.assert_close(gradient, expected, rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(p, torch.tensor(case["eval_pooled_logits"]), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("how", ["mean", "max", "lse"])
def test_aggregate_of_equal_clips_is_the_one_clip_answer(how):
    """Exactly under mean and max; under lse up to log N for every answer, so the softmax is the same."""
    one = torch.randn(1, 3, 5) * 4
    p = clipbert.aggregate_clips(one.expand(4, 3, 5), how)
    assert torch.equal(clipbert.aggregate_clips(one, how), one[0])
    if how == "lse":
        close(p - math.log(4), one[0], 1e-5)
        close(p.softmax(-1), one[0].softmax(-1), 1e-6)
    else:
        assert torch.equal(p, one[0])


@pytest.mark.parametrize("how", ["mean", "max", "lse"])
def test_aggregate_does_not_see_the_order_of_clips(how):
    logits = torch.randn(6, 3, 5) * 4
    close(clipbert.aggregate_clips(logits[torch.randperm(6)], how), clipbert.aggregate_clips(logits, how), 1e-5)


def test_aggregate_refuses_an_unknown_name():
    with pytest.raises(ValueError, match="mean, max or lse"):
        clipbert.aggregate_clips(torch.zeros(1, 1, 1), "median")
    with pytest.raises(ValueError, match="unknown kind"):
        clipbert.video_loss(torch.zeros(1, 1), torch.zeros(1), "essay")


def test_loss_of_each_kind_on_numbers_one_can_check_by_hand():
    choice = clipbert.video_loss(torch.tensor([[0.0], [math.log(3)]]), torch.tensor([1]), "choice")
    assert choice.item() == pytest.approx(math.log(4 / 3))  # softmax(0, ln 3) = (1/4, 3/4)
    answer = clipbert.video_loss(torch.zeros(2, 10), torch.tensor([3, 9]), "answer")
    assert answer.item() == pytest.approx(math.log(10))
    count = clipbert.video_loss(torch.tensor([[2.0], [5.0]]), torch.tensor([4, 5]), "count")
    assert count.item() == pytest.approx(2.0)  # (2² + 0²) / 2


# ----------------------------------------------------------------------------------------------------------------------
# Schedule and optimizer


@pytest.mark.parametrize("name", ["linear", "linear_odd"])
def test_schedule_is_exactly_the_references(name):
    case = GOLDEN["schedule"][name]
    for step, expected in case["values"]:
        lr = clipbert.learning_rate(step, case["num_train_steps"], case["learning_rate"], case["warmup_ratio"])
        assert lr == expected, step


def test_schedule_without_warmup_and_of_a_single_step():
    assert clipbert.learning_rate(1, 10, 1.0, warmup_ratio=0) == 0.9
    assert clipbert.learning_rate(1, 1, 1.0) == 1e-8


def test_optimizer_groups_are_the_references():
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


def test_optimizer_is_adamw_with_the_references_betas():
    optimizer = clipbert.build_optimizer(tiny_model())
    assert isinstance(optimizer, torch.optim.AdamW)
    assert optimizer.defaults["betas"] == (0.9, 0.98) and optimizer.defaults["eps"] == 1e-6
    assert [group["weight_decay"] for group in optimizer.param_groups] == [1e-3, 0]


# ----------------------------------------------------------------------------------------------------------------------
# Sanity: the first loss, and eight examples by heart


BASE = replace(clipbert.ClipBertConfig.base(), layers=2, vocab_size=1000)
CONFIGS = {"tiny": clipbert.ClipBertConfig.tiny(vocab_size=1000), "base": BASE}


@pytest.mark.parametrize("name", CONFIGS)
def test_init_loss_of_every_head_is_ln_classes(name):
    """A new model has no opinion: 5 options, 1540 answers, matching or not; counting starts near zero."""
    frames, ids, mask = batch(videos=2, texts=5, vocab=1000)
    for num_outputs, kind, classes in ((1, "choice", 5), (1540, "answer", 1540), (2, "answer", 2), (1, "count", 9)):
        n = 5 if kind == "choice" else 1
        with torch.no_grad():
            p = clipbert.ClipBert(CONFIGS[name], num_outputs)(frames, ids[: 2 * n], mask[: 2 * n])
        if kind == "count":
            assert math.isfinite(clipbert.video_loss(p, torch.tensor([2, 9]), kind)) and p.abs().max() < 1
            continue
        p = p.view(2, classes).repeat_interleave(classes, dim=0)  # every label once for every video
        p = p.view(-1, 1) if kind == "choice" else p
        loss = clipbert.video_loss(p, torch.arange(classes).repeat(2), kind).item()
        assert loss == pytest.approx(math.log(classes), rel=0.05), (kind, classes)


def test_init_loss_of_the_pretraining_heads_is_ln_classes():
    """Over the vocabulary for masked words, over two for matching (with BERT's initial scale)."""
    model = clipbert.ClipBertForPreTraining(BASE)
    frames, ids, mask = batch(videos=4, vocab=1000)
    with torch.no_grad():
        mlm, itm = model(frames, ids, mask)
    loss = F.cross_entropy(mlm.flatten(0, 1), torch.randint(0, 1000, (mlm.shape[0] * mlm.shape[1],)))
    assert loss.item() == pytest.approx(math.log(1000), rel=0.05)
    both = F.cross_entropy(itm.repeat(2, 1), torch.tensor([0] * 4 + [1] * 4))  # each pair under either label
    assert both.item() == pytest.approx(math.log(2), rel=0.05)


def train(model, data, target, kind, how, steps, lr, enough=0.0):
    """What the training loop does at every step, without its trimmings. Stops below `enough`. -> the last loss."""
    optimizer = clipbert.build_optimizer(model.train())
    for group in optimizer.param_groups:
        group["lr"] = lr
    for _ in range(steps):
        loss = clipbert.video_loss(clipbert.aggregate_clips(clipbert.clip_logits(model, *data), how), target, kind)
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 5.0)
        optimizer.step()
        if loss.item() < enough:
            break
    return loss.item()


HEADS = {"choice": ("mean", 1, 5), "answer": ("lse", 4, 1), "count": ("max", 1, 1)}


@pytest.mark.parametrize("kind", HEADS)
def test_overfit_eight_examples(kind):
    """Noise videos of two clips with random labels: what can learn at all gets eight of them by heart."""
    how, num_outputs, n = HEADS[kind]
    frames, ids, mask = batch(videos=16, frames=1, size=32)
    ids, mask = (x[:8].repeat_interleave(n, dim=0) for x in (ids, mask))
    if kind == "choice":
        ids[:, 1] = torch.arange(10, 10 + n).repeat(8)  # the options of a question differ in one token
    data, target = (frames.view(8, 2, 1, 3, 32, 32), ids, mask), torch.randint(0, 4, (8,))
    model = clipbert.ClipBert(TINY, num_outputs)
    loss = train(model, data, target, kind, how, steps=150, lr=3e-3, enough=0.01)
    assert loss < 0.01


# ----------------------------------------------------------------------------------------------------------------------
# Invariances


def test_invariance_to_the_ids_under_the_padding():
    model, (frames, ids, mask) = tiny_model(), batch(videos=4)
    other = torch.where(mask.bool(), ids, torch.randint(1, 100, ids.shape))
    assert not torch.equal(ids, other)
    close(model(frames, other, mask), model(frames, ids, mask), 1e-6)


def test_invariance_to_appended_padding():
    model, (frames, ids, mask) = tiny_model(), batch(videos=4)
    close(model(frames, F.pad(ids, (0, 5)), F.pad(mask, (0, 5))), model(frames, ids, mask), 1e-5)


def test_invariance_to_the_order_of_frames_in_a_clip():
    model, (frames, ids, mask) = tiny_model(), batch(frames=4)
    close(model(frames[:, [2, 0, 3, 1]], ids, mask), model(frames, ids, mask), 1e-6)


@pytest.mark.parametrize("how", ["mean", "max", "lse"])
def test_invariance_to_the_order_of_clips(how):
    model, (frames, ids, mask) = tiny_model(), batch(videos=6, texts=1)
    frames, text = frames.view(2, 3, 2, 3, 64, 64), (ids[:2], mask[:2])
    p, q = (
        clipbert.aggregate_clips(clipbert.clip_logits(model, x, *text), how) for x in (frames, frames[:, [2, 0, 1]])
    )
    close(p, q, 1e-6)


@pytest.mark.parametrize("how", ["mean", "max", "lse"])
def test_invariance_equal_clips_give_the_answer_of_one(how):
    """The whole path, from pixels: N equal clips of a video say what one says."""
    model, (frames, ids, mask) = tiny_model(), batch()
    logits = clipbert.clip_logits(model, frames[:, None].expand(-1, 4, -1, -1, -1, -1), ids, mask)
    p, one = clipbert.aggregate_clips(logits, how), model(frames, ids, mask)
    close(p.log_softmax(-1) if how == "lse" else p, one.log_softmax(-1) if how == "lse" else one, 1e-5)


def test_invariance_options_in_another_order_have_their_scores_in_that_order():
    model, (frames, ids, mask) = tiny_model(num_outputs=1), batch(texts=5)
    order = torch.tensor([3, 1, 4, 0, 2])
    moved = [x.view(2, 5, -1)[:, order].flatten(0, 1) for x in (ids, mask)]
    close(model(frames, *moved).view(2, 5), model(frames, ids, mask).view(2, 5)[:, order], 1e-6)


def test_invariance_has_limits_places_and_pixels_and_words_matter():
    """The tests above would pass on a constant model: this one must not."""
    model, (frames, ids, mask) = tiny_model(), batch()
    p = model(frames, ids, mask)
    for other in (model(frames.flip(-1), ids, mask), model(255 - frames, ids, mask), model(frames, ids.flip(1), mask)):
        assert (p - other).abs().max() > 1e-4


# ----------------------------------------------------------------------------------------------------------------------
# Pixels, and one CNN pass for many texts


def test_pixels_padding_becomes_minus_mean_over_std():
    cnn = clipbert.ClipBert(R50, 1).cnn
    mean, std = torch.tensor(R50.pixel_mean), torch.tensor(R50.pixel_std)
    close(cnn.normalize(torch.zeros(1, 3, 4, 4))[0, :, 0, 0], -mean / std, 1e-6)
    close(cnn.normalize(torch.full((1, 3, 4, 4), 255))[0, :, 3, 3], (255 - mean) / std, 1e-6)


def test_pixels_official_are_bgr_minus_the_rgb_mean():
    """The mean of a channel leaves before the channels change places; the standard deviation is 1."""
    cnn = tiny_model(cfg=replace(TINY, bgr=True, pixel_mean=(123.675, 116.28, 103.53), pixel_std=(1.0, 1.0, 1.0))).cnn
    red = torch.zeros(1, 3, 2, 2)
    red[:, 0] = 200
    close(cnn.normalize(red)[0, :, 0, 0], torch.tensor([-103.53, -116.28, 200 - 123.675]), 1e-5)
    official = clipbert.ClipBertConfig.official()
    assert official.bgr and official.caffe_strides and official.pixel_std == (1.0, 1.0, 1.0)


def test_pixels_uint8_and_float_are_the_same():
    model, (frames, ids, mask) = tiny_model(), batch()
    assert torch.equal(model(frames, ids, mask), model(frames.float(), ids, mask))


@pytest.mark.parametrize("cfg, size, cells", [(TINY, 64, 4), (R50, 128, 2), (R18, 128, 2)], ids=["tiny", "50", "18"])
def test_pixels_to_grid_stride(cfg, size, cells):
    """Stride 16 in the toy's backbone, 64 in the paper's and its lighter stand-in."""
    grid = clipbert.ClipBert(cfg, 1).encode_frames(torch.zeros(2, 3, 3, size, 2 * size, dtype=torch.uint8))
    assert grid.shape == (2, 3, cells, 2 * cells, 32)


def test_pixels_a_grid_without_positions_is_refused():
    model = tiny_model()
    assert model.visual_embeddings(torch.zeros(1, 1, 100, 100, 32)).shape == (1, 10_000, 32)
    with pytest.raises(ValueError, match="101"):
        model.visual_embeddings(torch.zeros(1, 1, 2, 101, 32))


def test_pixels_random_grid_tokens_keep_their_positions():
    """Pretraining draws tokens after adding positions: each drawn row is a row of the full sequence, in its order."""
    embed, grid = tiny_model().visual_embeddings, torch.randn(2, 1, 4, 4, 32)
    everything, some = embed(grid), embed(grid, keep=5)
    assert some.shape == (2, 5, 32)
    places = [(everything[0] - row).abs().sum(-1).argmin().item() for row in some[0]]
    assert places == sorted(set(places))
    close(some, everything[:, places], 1e-6)
    close(embed(grid, keep=16), everything, 0)


def counted(model):
    """The sizes of the batches that went through the CNN, filled in as it runs."""
    calls = []
    model.cnn.register_forward_hook(lambda module, args, out: calls.append(tuple(args[0].shape[:2])))
    return calls


def test_shared_clips_go_through_the_cnn_together_and_equal_one_by_one():
    """clip_logits is the model on each clip, stacked; several texts a video, one CNN pass in all."""
    model, (_, ids, mask) = tiny_model(), batch(videos=2, texts=3)
    frames = torch.randint(0, 256, (2, 4, 2, 3, 64, 64), dtype=torch.uint8)
    expected = torch.stack([model(frames[:, i], ids, mask) for i in range(4)])
    calls = counted(model)
    logits = clipbert.clip_logits(model, frames, ids, mask)
    assert calls == [(8, 2)]  # B*N clips, not B*N*n
    assert logits.shape == (4, 6, 7)
    close(logits, expected, 1e-5)


def test_shared_video_of_n_texts_equals_repeated_videos():
    model, (frames, ids, mask) = tiny_model(), batch(videos=2, texts=3)
    calls = counted(model)
    shared = model(frames, ids, mask)
    assert calls == [(2, 2)]
    close(shared, model(frames.repeat_interleave(3, dim=0), ids, mask), 1e-5)


def test_shared_videos_that_do_not_divide_the_texts_are_refused():
    model, (frames, ids, mask) = tiny_model(), batch(videos=3)
    with pytest.raises(ValueError, match="3 texts do not divide among 2 videos"):
        model(frames[:2], ids, mask)


# ----------------------------------------------------------------------------------------------------------------------
# Frozen parts


def test_frozen_parts_do_not_move():
    """After one optimizer step stem, res2 and every FrozenBatchNorm are bit for bit what they were; the rest moved."""
    model = clipbert.ClipBert(replace(R50, init_std=0.2), 4)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    frames, ids, mask = batch(videos=2, size=128)
    train(model, (frames[:, None], ids, mask), torch.tensor([1, 3]), "answer", "mean", steps=1, lr=1e-2)
    buffers = {name for name, _ in model.named_buffers()}
    assert sum(isinstance(module, FrozenBatchNorm2d) for module in model.modules()) == 53
    for name, value in model.state_dict().items():
        if name in buffers or name.startswith(("cnn.resnet.conv1", "cnn.resnet.layer1")):
            assert torch.equal(value, before[name]), name
        elif name.startswith("cnn."):
            assert not torch.equal(value, before[name]), name


def test_frozen_norms_folded_into_their_convolutions_compute_what_torchvision_does():
    """With statistics that do something, values and gradients."""
    for block in (clipbert.Bottleneck(64, 16, norm_layer=FrozenBatchNorm2d), clipbert.BasicBlock(64, 64, 1)):
        for module in block.modules():
            if isinstance(module, FrozenBatchNorm2d):
                for buffer in (module.weight, module.bias, module.running_mean, module.running_var):
                    buffer.copy_(torch.rand_like(buffer) + 0.1)
        block.eval()
        x = torch.randn(2, 64, 8, 8)
        theirs, ours = block(x), clipbert.residual_block(x, block)
        torch.testing.assert_close(ours, theirs)
        weights = [p for name, p in block.named_parameters() if "conv" in name]
        for a, b in zip(*(torch.autograd.grad(y.square().sum(), weights) for y in (ours, theirs)), strict=True):
            torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-4)


# ----------------------------------------------------------------------------------------------------------------------
# A training step without waste


def kept_for_backward(model, frames):
    """The activations of the CNN that autograd keeps under bf16."""
    kept = {}

    def pack(tensor):
        if tensor.ndim == 4 and tensor.shape[0] == frames.shape[0] * frames.shape[1]:
            kept[tensor.data_ptr()] = tensor
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor), torch.autocast("cpu", torch.bfloat16):
        model.encode_frames(frames).sum().backward()
    return list(kept.values())


def test_waste_nothing_is_kept_of_frozen_stages_and_the_rest_in_half_precision():
    model, frames = tiny_model(cfg=R50), batch(videos=3, frames=1)[0]
    kept = kept_for_backward(model, frames)
    assert kept and {tensor.dtype for tensor in kept} <= {torch.bfloat16, torch.int64}  # int64: of the max-pool
    assert max(tensor.shape[-1] for tensor in kept) == 64 // 4  # res2's output, res3's input; the stem's are larger
    channels = {tensor.shape[1] for tensor in kept if tensor.shape[-1] == 64 // 4}
    assert channels == {256, 128}  # in res2 there are activations of 64 channels: not here


def test_waste_chunks_give_the_same_gradients_and_keep_only_the_frames():
    model, frames = tiny_model(), batch(videos=5, frames=1)[0]
    gradients, calls, features = [], [], model.cnn.features
    model.cnn.features = lambda part: calls.append(len(part)) or features(part)
    for chunk in (None, 2):
        model.cnn.chunk = chunk
        model.zero_grad()
        model.encode_frames(frames).square().mean().backward()
        gradients.append([p.grad for p in model.cnn.parameters()])
    assert calls[:4] == [5, 2, 2, 1] and sorted(calls[4:]) == [1, 2, 2]  # forward; and again in the backward pass
    for whole, parts in zip(*gradients, strict=True):
        torch.testing.assert_close(parts, whole, rtol=1e-4, atol=1e-7)
    with torch.no_grad():
        model.encode_frames(frames)
    assert calls[7:] == [2, 2, 1]


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


def test_waste_the_detector_sees_what_makes_a_gpu_wait():
    x = torch.arange(4.0)
    for job in (lambda: x.sum().item(), lambda: float(x[0]), lambda: x[x > 1], lambda: (x > 1).nonzero(),
                lambda: bool(x.sum() > 3), lambda: x.repeat_interleave(torch.tensor([1, 2, 0, 1]))):  # fmt: skip
        with Reads() as reads:
            job()
        assert reads.seen
    with Reads() as reads:
        x[torch.tensor([1, 2])] + x.repeat_interleave(2)[:2]
    assert not reads.seen


TARGETS = {"choice": torch.tensor([1, 0]), "answer": torch.tensor([3, 1]), "count": torch.tensor([2, 4]),
           "match": torch.tensor([1, 0, 1, 0]), "rank": torch.tensor([1, 0, 1, 0]), "soft": torch.ones(2, 6)}


@pytest.mark.parametrize("kind", [*TARGETS, "pretraining"])
def test_waste_a_training_step_never_waits_for_the_device(kind):
    """Forward, loss, backward, clipping, update: not one value is read back."""
    cfg = replace(TINY, dropout=0.1)
    frames, ids, mask = batch(videos=2, texts=2 if kind in ("choice", "match", "rank", "pretraining") else 1)
    outputs = {"choice": 1, "answer": 7, "soft": 7, "count": 1, "match": 2, "rank": 1}
    model = clipbert.ClipBert(cfg, outputs[kind]) if kind in outputs else clipbert.ClipBertForPreTraining(cfg)
    optimizer = clipbert.build_optimizer(model)
    labels = torch.where(torch.rand(ids.shape) < 0.3, ids, -100)
    with Reads() as reads:
        if kind == "pretraining":
            mlm, itm = model(frames, ids, mask, keep=5)
            loss = clipbert.mlm_loss(mlm, labels) + clipbert.itm_loss(itm, torch.tensor([1, 0, 1, 0]))
        else:
            p = clipbert.aggregate_clips(clipbert.clip_logits(model, frames[:, None], ids, mask), "lse")
            loss = clipbert.video_loss(p, TARGETS[kind], kind)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 5.0)
        optimizer.step()
    assert reads.seen == []


def test_waste_of_memory_ends_in_flags_for_the_same_update(capsys):
    settings = {"batch_size": 16, "grad_accum": 2, "frames": 2, "train_clips": 8, "size": 448}

    def job(args):
        raise torch.OutOfMemoryError("CUDA out of memory")

    with pytest.raises(SystemExit) as stop:
        clipbert.main(job, SimpleNamespace(settings=settings, chunk=None, debug=False))
    error = capsys.readouterr().err
    assert stop.value.code == 2 and error.count("\n") == 1
    flags = ("--batch_size 8 --grad_accum 4", "--chunk 16", "--size 320")
    assert [error.index(flag) for flag in flags] == sorted(error.index(flag) for flag in flags)
    others = ((15, 1, 8, ("--batch_size 5 --grad_accum 3", "--chunk 4")), (1, 4, None, ("--chunk 8",)))
    for batch_size, accum, chunk, expected in others:
        text = clipbert.less_memory(settings | {"batch_size": batch_size, "grad_accum": accum}, chunk)
        assert all(flag in text for flag in expected) and ("--batch_size" in text) == (batch_size > 1)


# ----------------------------------------------------------------------------------------------------------------------
# Checkpoints and pretrained weights


def checkpoint(model):
    return {"config": asdict(model.cfg), "model": model.state_dict(), "step": 3, "task": "tgif_qa"}


def test_checkpoint_round_trip(tmp_path):
    """A model built from nothing but the file is the model that was saved."""
    model, data = tiny_model(), batch()
    clipbert.save_checkpoint(tmp_path / "last.pt", checkpoint(model))
    assert [file.name for file in tmp_path.iterdir()] == ["last.pt"]  # no temporary file stays
    state = clipbert.load_checkpoint(tmp_path / "last.pt")
    cfg = clipbert.config_from(state)
    assert cfg == model.cfg and state["step"] == 3
    other = tiny_model(cfg=cfg)
    report = clipbert.copy_weights(other, state["model"])
    assert report.missing == report.unexpected == report.mismatched == []
    assert torch.equal(other(*data), model(*data))


def test_checkpoint_config_survives_json():
    """config.json turns tuples into lists; they come back as tuples."""
    for cfg in (clipbert.ClipBertConfig.base(), clipbert.ClipBertConfig.official(), clipbert.ClipBertConfig.tiny()):
        assert clipbert.config_from({"config": json.loads(json.dumps(asdict(cfg)))}) == cfg


@pytest.mark.parametrize("error", [OSError("No space left on device"), KeyboardInterrupt()], ids=["disk", "ctrl-c"])
def test_checkpoint_that_fails_half_way_leaves_the_old_one(tmp_path, monkeypatch, error):
    path = tmp_path / "last.pt"
    clipbert.save_checkpoint(path, {"step": 1})

    def half(state, file):
        file.write(b"half a checkpoint")
        raise error

    monkeypatch.setattr(torch, "save", half)
    with pytest.raises(type(error)):
        clipbert.save_checkpoint(path, {"step": 2})
    monkeypatch.undo()
    assert clipbert.load_checkpoint(path) == {"step": 1}
    clipbert.save_checkpoint(path, {"step": 3})  # and what is left of the failure is in nobody's way
    assert clipbert.load_checkpoint(path) == {"step": 3}
    assert [file.name for file in tmp_path.iterdir()] == ["last.pt"]


class Boom:
    """A pickle that runs code when it is read."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return open, (str(self.path), "w")


@pytest.mark.parametrize("how", ["torch", "pickle"])
def test_checkpoint_with_code_inside_is_refused_unread(tmp_path, how):
    path, ran = tmp_path / "strange.pt", tmp_path / "ran"
    if how == "torch":
        torch.save({"model": Boom(ran)}, path)
    else:
        path.write_bytes(pickle.dumps(Boom(ran), protocol=2))
    with pytest.raises(ValueError, match="strange.pt") as error:
        clipbert.load_checkpoint(path)
    assert "\n" not in str(error.value)
    assert not ran.exists()


def test_checkpoint_that_is_missing_or_cut_short_is_one_line(tmp_path):
    with pytest.raises(ValueError, match="no such checkpoint"):
        clipbert.load_checkpoint(tmp_path / "nowhere.pt")
    path = tmp_path / "cut.pt"
    clipbert.save_checkpoint(path, {"x": torch.zeros(1000)})
    path.write_bytes(path.read_bytes()[:1000])
    with pytest.raises(ValueError, match="cut.pt: not a whole checkpoint") as error:
        clipbert.load_checkpoint(path)
    assert "\n" not in str(error.value)


def resnet_file(path, backbone):
    """What torchvision publishes, with random statistics: a state dict with fc.* and num_batches_tracked."""
    resnet = torchvision.models.get_model(backbone)
    for name, value in resnet.state_dict().items():
        if ".running_" in name or ".bn" in name:
            value.copy_(torch.rand_like(value.float()) + 0.5)
    torch.save(resnet.state_dict(), path)
    return resnet.eval()


@pytest.mark.parametrize("cfg", [R50, R18], ids=["resnet50", "resnet18"])
def test_pretrained_local_files_fill_every_tensor_and_give_the_same_outputs(cfg, tmp_path):
    """--resnet FILE --bert DIR: the CNN computes what torchvision's does, F_l and H hold BERT's own tensors."""
    resnet = resnet_file(tmp_path / "resnet.pth", cfg.backbone)
    bert = BertModel(clipbert.bert_config(cfg)).eval()
    bert.save_pretrained(tmp_path / "bert")
    model = clipbert.ClipBert(cfg, 1).eval()
    report = clipbert.load_pretrained(model, tmp_path / "resnet.pth", tmp_path / "bert")
    assert report.unexpected == report.mismatched == report.unused == []
    new = ("visual_embeddings.", "classifier.", "cnn.grid_encoder.")
    assert report.missing == [name for name in model.state_dict() if name.startswith(new)]

    for name, value in bert.state_dict().items():
        assert torch.equal(model.bert.state_dict()[name], value), name
    theirs = resnet.state_dict()
    for name, value in model.cnn.resnet.state_dict().items():
        assert torch.equal(theirs[name], value), name
    resnet.avgpool = resnet.fc = torch.nn.Identity()
    frames = torch.randint(0, 256, (1, 1, 3, 64, 64), dtype=torch.uint8)
    seen = []
    model.cnn.grid_encoder.register_forward_pre_hook(lambda module, args: seen.append(args[0]))
    model.encode_frames(frames)
    expected = resnet(model.cnn.normalize(frames[0])).view_as(seen[0])
    assert (seen[0] - expected).abs().max() <= 1e-4 * expected.abs().max()


def test_pretrained_weights_of_another_resnet_are_refused(tmp_path):
    BertModel(clipbert.bert_config(R18)).save_pretrained(tmp_path / "bert")
    for backbone in ("resnet50", "resnet34"):  # of other shapes; of the same ones, but with more blocks
        resnet_file(tmp_path / "other.pth", backbone)
        with pytest.raises(ValueError, match="other.pth: not a resnet18; give torchvision's resnet18-"):
            clipbert.load_pretrained(clipbert.ClipBert(R18, 1), tmp_path / "other.pth", tmp_path / "bert")


def test_resnet18_is_the_lighter_one():
    """11.2M of ResNet-18 instead of ResNet-50's 23.5M, and a grid encoder of 512 instead of 2048 channels."""
    base = clipbert.ClipBertConfig.base()
    full, light = (sum(p.numel() for p in clipbert.GridFeatures(cfg).parameters())
                   for cfg in (base, replace(base, backbone="resnet18")))  # fmt: skip
    norms = {"resnet50": 53_120, "resnet18": 9_600}  # torchvision's BatchNorm gains and biases: buffers here
    assert full == 25_557_032 - 2048 * 1000 - 1000 - norms["resnet50"] + 9 * 2048 * 768
    assert light == 11_689_512 - 512 * 1000 - 1000 - norms["resnet18"] + 9 * 512 * 768


@pytest.mark.parametrize("message", ["Max retries exceeded\nand more", ""], ids=["message", "no-message"])
@pytest.mark.parametrize("which", ["resnet", "bert"])
def test_pretrained_without_network_lists_the_choices(monkeypatch, which, message):
    """One line, whichever download fails and whatever the hub says about it (nothing, sometimes)."""

    def no_network(*args, **kwargs):
        raise TimeoutError(message)

    resnet = torchvision.models.resnet18()
    monkeypatch.setattr(BertModel, "from_pretrained", no_network)
    monkeypatch.setattr(torchvision.models, "get_model", no_network if which == "resnet" else lambda *a, **k: resnet)
    with pytest.raises(ValueError, match="TimeoutError") as raised:
        clipbert.load_pretrained(tiny_model())
    for choice in ("--resnet", "--bert", "--init", "--scratch"):
        assert choice in str(raised.value)
    assert "\n" not in str(raised.value)


def test_pretrained_file_that_is_missing_is_named(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError, match="nowhere.pth: no such checkpoint"):
        clipbert.load_pretrained(tiny_model(), resnet="nowhere.pth", bert=tmp_path)
