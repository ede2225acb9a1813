"""Wrong command lines: exit code 2 and exactly one line, which names the thing and the remedy.

Each row of WRONG is a command as it would be typed. {toy} and {captions} stand for folders of toy data, {gif} for one of
its videos, {run} and {pre} for short runs on them, {tmp} for an empty folder beside a few bad files.
"""

import re
import shlex

import pytest
import torch
from conftest import run

import data
import finetune
import pretrain


def command(line):
    """Run `finetune ...`, `pretrain ...` or `data ...` in this process."""
    script, *arguments = shlex.split(line)
    if script == "data":
        data.main(arguments)
    else:
        run({"finetune": finetune, "pretrain": pretrain}[script], *arguments)


class Attack:
    """Unpickled, it would run a command."""

    def __reduce__(self):
        return (exec, ("import pathlib; pathlib.Path('attacked').touch()",))


@pytest.fixture(scope="module")
def places(tmp_path_factory, toy_videos, toy_photos):
    tmp = tmp_path_factory.mktemp("commands")
    (tmp / "empty").mkdir()
    (tmp / "text.pt").write_text("not a checkpoint")
    (tmp / "bad.gif").write_bytes(b"GIF89a")
    torch.save({"model": Attack()}, tmp / "attack.pt")
    torch.save([1, 2], tmp / "list.pt")
    torch.save({"config": {"n_layer": 12}, "model": {}}, tmp / "gpt.pt")
    places = {"tmp": tmp, "toy": toy_videos, "captions": toy_photos, "run": tmp / "run", "pre": tmp / "pre"}
    places["gif"] = toy_videos / "gifs" / "toy_test_0000.gif"
    command("finetune --data {toy} --out {run} --batch_size 2 --max_steps 1 --test_clips 1".format(**places))
    command("pretrain --data {captions} --out {pre} --batch_size 2 --max_steps 1".format(**places))
    return places


EVAL = "finetune --data {toy} --eval {run}/best.pt"
WRONG = [  # command, words of its one line
    ("finetune --task tgif_qa_acton", "invalid choice: 'tgif_qa_acton' did you mean tgif_qa_action?"),
    ("finetune --learning_rate 1", "unrecognized arguments: --learning_rate --help"),
    ("finetune --batchsize 1", "unrecognized arguments: --batchsize did you mean --batch_size?"),
    ("pretrain --task tgif_qa", "unrecognized arguments: --task"),
    ("finetune --size 1.5", "'1.5' is not a whole number"),
    ("finetune --data {toy} --size 2000", "--size 2000 this model's grid takes 16 to 1600 pixels"),
    ("finetune --data {toy} --frames 1000000", "--frames: '1000000' is not a whole number from 1 to 256"),
    ("finetune --data {toy} --test_clips 0", "--test_clips: '0' is not a whole number from 1"),
    ("finetune --lr nan", "--lr: 'nan' is not a number from 0"),
    ("pretrain --mask_rate 1.5", "--mask_rate: '1.5' is not a number from 0.001 to 1"),
    ("finetune --data {tmp}/nowhere", "--data nowhere: no such folder; give the one that holds the data set"),
    ("finetune --data {tmp}/text.pt", "--data text.pt: not a folder; give the folder that holds it"),
    ("finetune --data {tmp}/empty", "empty: no annotation file; looked for Train_action_question*.csv"),
    ("pretrain --data {toy}/gifs", "gifs: no annotation file; looked for *caption[s_]*.json"),
    ("pretrain --data {captions} --limit 1", "1 validation images are too few: put more captioned images there"),
    ("finetune --data {toy} --out {run}", "run: holds a run; choose another --out, go on with --resume --overwrite"),
    ("finetune --data {toy} --out {tmp}/text.pt/run", "text.pt/run Not a directory another --out"),
    ("finetune --data {toy} --out {tmp}/empty --resume", "empty: holds no whole last.pt or previous.pt to start anew, leave out"),
    ("finetune --data {toy} --init {tmp}/none.pt", "none.pt: no such checkpoint give a file"),
    ("finetune --data {toy} --init {toy}", "videos: no such checkpoint (Is a directory) give a file"),
    ("finetune --data {toy} --init {tmp}/text.pt", "text.pt: not a whole checkpoint copy the file again"),
    ("finetune --data {toy} --init {tmp}/attack.pt", "attack.pt: not a whole checkpoint of tensors and plain values"),
    ("finetune --data {toy} --init {tmp}/list.pt", "list.pt: is a list, not named values"),
    ("finetune --data {toy} --init {tmp}/gpt.pt", "config is not one of ClipBERT's; give"),
    ("finetune --data {toy} --init {run}/best.pt --model base", "best.pt: a checkpoint of tiny; leave out --model"),
    ("finetune --data {toy} --init {run}/best.pt --resume", "--init, --resume and --eval exclude each other choose"),
    ("finetune --data {toy} --eval {pre}/best.pt", "best.pt: not a checkpoint that this script has trained --init"),
    (EVAL + " --task tgif_qa_frameqa", "best.pt: a checkpoint of --task tgif_qa_action, not tgif_qa_frameqa"),
    (EVAL + " --predict {gif}", "--predict needs --question"),
    (EVAL + " --question 'what ?'", "--question needs --predict"),
    ("finetune --split val", "--split needs --eval"),
    (EVAL + " --sheet a.png", "--sheet needs --predict"),
    (EVAL + " --predict {gif} --question q --options a b --sheet none/a.png", "none/a.png"),
    (EVAL + " --predict x.gif --question q", "--task tgif_qa_action: --options for multiple choice; none for open questions"),
    (EVAL + " --predict {tmp}/x.gif --question q --options a b", "x.gif: no such file; check the path"),
    (EVAL + " --predict {tmp}/bad.gif --question q --options a b", "bad.gif: replace or remove it"),
    ("finetune --data {toy} --bert {toy}", "--bert is for --model base; add that, or leave"),
    ("finetune --data {toy} --init {run}/best.pt --scratch", "--scratch is for --model base; add that, or leave"),
    ("data", "arguments are required: command"),
    ("data chek", "invalid choice: 'chek' did you mean check?"),
    ("data cache --data {tmp}/empty", "empty: no videos in it"),
    ("data show {tmp}/x.gif", "x.gif: no such file"),
    ("data show {gif} --clip 2", "unrecognized arguments: --clip did you mean --clips?"),
    ("data show {gif} --out sheet.nonsense", "nonsense"),
    ("data show {gif} --out none/a.png", "none/a.png"),
    ("data toy {tmp}/text.pt", "text.pt/videos: Not a directory choose another directory"),
]  # fmt: skip
if not torch.cuda.is_available():
    WRONG.append(("finetune --data {toy} --precision fp16", "--precision fp16 needs a GPU: choose fp32 or bf16"))


@pytest.mark.parametrize("line, words", WRONG, ids=[line for line, _ in WRONG])
def test_a_wrong_command_ends_in_one_line(line, words, places, capsys, tmp_path, monkeypatch, recwarn):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as stop:
        command(line.format(**places))
    message = capsys.readouterr().err
    assert stop.value.code == 2 and not recwarn.list  # a warning would be a second line
    assert message.startswith("error: ") and message.endswith("\n") and message.count("\n") == 1, message
    assert len(message) < 700 and message[:-1].isprintable()
    assert re.search(".*".join(map(re.escape, words.split())), message), message  # in this order
    assert not (tmp_path / "attacked").exists()


def test_debug_shows_where_it_happened(places):
    with pytest.raises(ValueError, match="no such checkpoint"):
        command(f"finetune --data {places['toy']} --init none.pt --debug")
