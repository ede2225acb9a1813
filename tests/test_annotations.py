"""Annotation readers: every public layout, every way a row can be wrong, and the verbatim samples where they are."""
import json
import shutil

import pytest
from conftest import SHARED, refused

import data

read = data.read_examples
ACTION = "gif_name\tquestion\ta1\ta2\ta3\ta4\ta5\tanswer\tvid_id\tkey"
WAVES = "g1\tWhat does the \"cat do 2 times ?\twave\tjump\tspin\tnod\thop\t3\tACTION1\t7"
JUMPS = "g2\tWhat does the dog do ?\tjump\twave\tspin\tnod\thop\t0\tACTION2\t7"


def save(folder, name, content):
    path = folder / name
    path.parent.mkdir(parents=True, exist_ok=True)
    if not isinstance(content, (str, bytes)):
        content = "\n".join(map(json.dumps, content)) if name.endswith(".jsonl") else json.dumps(content)
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    return path


# ---------------------------------------------------------------- every layout
E, A_TO_E = data.Example, tuple("abcde")
CHOICE = {"question": "what ?", "options": list(A_TO_E), "answer": 4, "gif_name": "g"}
NUMBER = {"question": "what ?", "answer": "two", "gif_name": "g", "answer_type": "number"}
SUNG = [{"question": "who sings ?", "answer": "man", "video_id": 6513, "id": 4, "category_id": 3},
        {"question": "who ?", "answer": "a cat", "video_id": "video7", "id": 5, "answer_type": "who"}]
SINGERS = [E("4", "video6513", "who sings ?", (), "man"), E("5", "video7", "who ?", (), "a cat", "who")]
SAID = [{"caption": "a  b", "clip_name": "v1"}, {"caption": "line\u2028break", "clip_name": "v2"}]
PEOPLE = ("yes", "no", "Two.", "a dog", "yes") * 2
SCORES = {"yes": 1, "no": 2 / 3, "2": 2 / 3, "dog": 2 / 3}
ASKED = [{"question_id": 8, "question": "is it ?"}, {"question_id": 9, "question": "wer läuft ?", "image_id": 5}]
ANSWERED = [{"question_id": i, "image_id": 5, "answer_type": "other",
             "answers": [{"answer": answer} for answer in PEOPLE]} for i in (9, 8)]
MSRVTT = {"videos": [{"video_id": f"v{i}", "split": "validate" if i == 1 else "train"} for i in range(3)],
          "sentences": [{"sen_id": i, "video_id": f"v{i % 3}", "caption": f"it is {i}"} for i in range(4)]}
COCO = {"images": [{"id": 1, "file_name": "COCO_1.jpg"}, {"id": 2}],
        "annotations": [{"id": 5, "image_id": 2, "caption": "a dog\n"}, {"id": 6, "image_id": 1, "caption": " "},
                        {"id": 7, "image_id": 1, "caption": "a cat"}]}
REGIONS = [{"id": 4, "regions": [{"region_id": 5, "image_id": 4, "phrase": "sky"}]},
           {"regions": [{"region_id": 6, "image_id": 3, "phrase": "tree"}]}]
FILES = [  # task, split, {file: what it says} (the first with a BOM, mixed line ends), the examples that they mean
    ("tgif_qa", "train", {"Train_action_question.csv": f"\ufeff{ACTION}\r\n{WAVES}\n{JUMPS}\r\n\n"}, [
        E("ACTION1", "g1", 'What does the "cat do 2 times ?', ("wave", "jump", "spin", "nod", "hop"), 3),
        E("ACTION2", "g2", "What does the dog do ?", ("jump", "wave", "spin", "nod", "hop"), 0)]),
    ("tgif_qa_count", "test", {"Test_count_question.csv":
        "gif_name\tquestion\tanswer\tvid_id\tkey\ng\tHow ?\t10\tCOUNT1\t5\nh\tHow ?\t2\tCOUNT2\t5\n"},
     [E("COUNT1", "g", "How ?", (), 10), E("COUNT2", "h", "How ?", (), 2)]),
    ("tgif_qa_frameqa", "test", {"Test_frameqa_question.csv":
        "gif_name\tquestion\tanswer\ttype\tvid_id\tkey\tdescription\ng\twhat color ?\tred\t2\tFRAMEQA1\t5\t\n"},
     [E("FRAMEQA1", "g", "what color ?", (), "red", "color")]),
    *[("tgif_qa_action", "train", {name: [CHOICE, CHOICE | {"answer": 0}]},
       [E("1", "g", "what ?", A_TO_E, 4), E("2", "g", "what ?", A_TO_E, 0)])
      for name in ("action/train.jsonl", "tgif_action_train.jsonl", "train_action.jsonl")],
    ("tgif_qa_frameqa", "test", {"frameqa_test.jsonl": [NUMBER, NUMBER | {"answer_type": 1}]},
     [E(str(i), "g", "what ?", (), "two", "number") for i in (1, 2)]),
    ("msrvtt_retrieval", "train", {"MSRVTT_train.9k.csv": "video_id\r\nv0\r\nv2\r\n", "MSRVTT_data.json": MSRVTT},
     [E(str(i), f"v{i % 3}", f"it is {i}") for i in (0, 2, 3)]),
    ("msrvtt_retrieval", "test", {"MSRVTT_JSFUSION_test.csv":
        'key,vid_key,video_id,sentence\r\nret0,msr1,video1,"a dog, running"\r\nret1,msr2,video2,a cat'},
     [E("ret0", "video1", "a dog, running"), E("ret1", "video2", "a cat")]),
    ("msrvtt_retrieval", "test", {"test.jsonl": SAID}, [E("1", "v1", "a b"), E("2", "v2", "line break")]),
    *[(task, "test", {"test.jsonl": SAID}, [E("v1", "v1", "a b"), E("v2", "v2", "line break")])  # known by their video
      for task in ("didemo_retrieval", "activitynet_retrieval")],
    ("didemo_retrieval", "val", {"val_data.json": [
        {"video": video, "description": text, "annotation_id": i, "times": []}
        for i, (video, text) in enumerate([("x.mov", "a cat."), ("y.mov", "b"), ("x.mov", "it sits")])]},
     [E("x.mov", "x.mov", "a cat. it sits"), E("y.mov", "y.mov", "b")]),
    ("activitynet_retrieval", "test", {"val_1.json": {
        "v_a": {"duration": 3, "timestamps": [[0, 3]], "sentences": ["1.", "  Two.", ""]}, "v_b": {"sentences": ["X"]}}},
     [E("v_a", "v_a", "1. Two."), E("v_b", "v_b", "X")]),
    ("activitynet_retrieval", "val", {"val_1.csv": "video_id\tcaption\tstart\nv_a\tOne\t0\nv_b\tX\t0\nv_a\tTwo\t1\n"},
     [E("v_a", "v_a", "One Two"), E("v_b", "v_b", "X")]),
    ("msrvtt_qa", "val", {"val_qa.json": SUNG}, SINGERS),
    ("msrvtt_qa", "test", {"msrvtt_qa_test.jsonl": SUNG}, SINGERS),
    ("msrvtt_mc", "test", {"msrvtt_mc_test.jsonl": [{"clip_name": "video1", "options": list(A_TO_E), "answer": 2}]},
     [E("1", "video1", "", A_TO_E, 2)]),
    ("vqa", "train", {"v2_OpenEnded_mscoco_train2014_questions.json": {"questions": ASKED},
                      "v2_mscoco_train2014_annotations.json": {"annotations": ANSWERED}},
     [E(str(row["question_id"]), "000000000005", row["question"], (), SCORES, "other", PEOPLE) for row in ASKED]),
    ("vqa", "test", {"vqa_test.jsonl": [
        {"question": "is", "question_id": 1, "image_id": 7, "labels": {"a": 1, "b": 0}}]},
     [E("1", "000000000007", "is", (), {"a": 1, "b": 0})]),
    ("pretrain", "train", {"MSRVTT_data.json": MSRVTT},
     [E(f"MSRVTT_data/{i}", f"v{i % 3}", f"it is {i}") for i in (0, 2, 3)]),
    *[("pretrain", split, {f"{name}.json": COCO},
       [E(f"{name}/5", "000000000002", "a dog"), E(f"{name}/7", "COCO_1.jpg", "a cat")])
      for split, name in (("train", "captions_train2014"), ("val", "mscoco_captions_val2014"))],
    ("pretrain", "train", {"region_descriptions.json": REGIONS},
     [E("region_descriptions/5", "4.jpg", "sky"), E("region_descriptions/6", "3.jpg", "tree")]),
    ("pretrain", "train", {"coco_train.jsonl": [{"caption": "x", "coco_id": 7}, {"caption": ["y", "z"], "vg_id": 7}]},
     [E("coco_train/1", "000000000007", "x"), E("coco_train/2", "7.jpg", "y"), E("coco_train/2", "7.jpg", "z")]),
    ("msrvtt_retrieval", "train", {"train.csv": "path,caption\nc/a.mp4,a cat\nb.mp4,a dog\nc/a.mp4,a cat\n"},
     [E("2", "c/a.mp4", "a cat"), E("3", "b.mp4", "a dog"), E("4", "c/a.mp4", "a cat")]),
    ("didemo_retrieval", "test", {"test.tsv": "path\tcaption\na.mp4\ta cat\n"}, [E("a.mp4", "a.mp4", "a cat")]),
    ("msrvtt_qa", "val", {"val.csv": "path,question,answer\n12,What is it ?,a cat\n"},
     [E("2", "12", "What is it ?", (), "a cat")]),
    ("pretrain", "train", {"mine.csv": 'path,caption\nclips/a.mp4,"a, b"\n12,c\n'},
     [E("mine/2", "clips/a.mp4", "a, b"), E("mine/3", "12", "c")]),
]  # fmt: skip
LAYOUTS = {f"{file[0]}-{list(file[2])[-1]}": file for file in FILES}  # for stress.py, too


@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_file_is_read_as_it_stands(tmp_path, layout):
    task, split, files, examples = LAYOUTS[layout]
    for name, content in files.items():
        path = save(tmp_path, name, content)
        path.with_name(f"._{path.name}").touch()  # macOS likes to put such files beside others
    assert read(task, tmp_path, split) == examples


def test_msrvtt_retrieval_reads_the_listed_videos_from_both_json_files(tmp_path, capsys):
    other = {name: [row | {"video_id": "v7", "split": "test"} for row in rows[:2]] for name, rows in MSRVTT.items()}
    save(tmp_path, "train_val_videodatainfo.json", MSRVTT)
    save(tmp_path, "test_videodatainfo.json", other | {"videos": other["videos"][:1]})
    save(tmp_path, "MSRVTT_train.9k.csv", "video_id\r\nv0\r\nv7\r\nv9\r\n")
    save(tmp_path, "MSRVTT_train.7k.csv", "video_id\nv2\n")
    assert [e.video for e in read("msrvtt_retrieval", tmp_path, "train")] == ["v0"] * 2 + ["v7"] * 2
    assert "1 of its 3 videos have no caption" in capsys.readouterr().err
    (tmp_path / "MSRVTT_train.9k.csv").unlink()  # without it, the other public list
    assert [e.video for e in read("msrvtt_retrieval", tmp_path, "train")] == ["v2"]
    assert [len(read("pretrain", tmp_path, split)) for split in ("train", "test")] == [3, 2]


def test_msrvtt_1ka_test_has_one_caption_per_video(tmp_path):
    rows = ["key,vid_key,video_id,sentence", "ret0,msr1,video1,a dog", "ret1,msr2,video2,a cat", "ret2,msr1,video1,it"]
    save(tmp_path, "MSRVTT_JSFUSION_test.csv", "\n".join(rows))
    assert refused(read, "msrvtt_retrieval", tmp_path, "test").endswith(
        "_test.csv:4: a second caption of 'video1'; in testing it has one: remove the others")


def vqa(folder, said, name="train2014"):
    save(folder, f"v2_OpenEnded_mscoco_{name}_questions.json",
          {"questions": [{"image_id": 9, "question": "How many ?", "question_id": 90}]})
    save(folder, f"v2_mscoco_{name}_annotations.json",
          {"annotations": [{"image_id": 9, "question_id": 90, "answer_type": "number",
                            "answers": [{"answer": a, "answer_id": i} for i, a in enumerate(said)]}]})


def test_vqa_soft_scores_and_official_accuracy(tmp_path):
    vqa(tmp_path, ["2"] * 2 + ["Two."] + ["a dog", "the dog"] + ["3"] + ["dont know"] * 4)
    example, = read("vqa", tmp_path, "train")
    assert example.answer == {"2": 1, "dog": 2 / 3, "3": 1 / 3, "don't know": 1}
    assert (example.video, example.question_type, len(example.people)) == ("000000000009", "number", 10)
    official = {"2": .9, "two": .9, "dog": .6, "3": .3, "don't know": 1, "cat": 0}  # 3 people: 3 x 2/3 + 7 x 1
    assert {answer: pytest.approx(data.vqa_accuracy(answer, example)) for answer in official} == official
    unanimous = example._replace(people=("two",) * 10)  # here the official script compares letter by letter
    assert [data.vqa_accuracy(answer, unanimous) for answer in ("two", "2")] == [1, 0]


def test_labels_of_a_jsonl_are_accuracies_and_vqa_is_tested_on_val(tmp_path):
    vqa(tmp_path, ["yes"] * 10, "val2014")
    example, = read("vqa", tmp_path, "test")
    assert example.answer == {"yes": 1}
    assert data.vqa_accuracy("no", example._replace(answer={"yes": 1, "no": .3}, people=())) == .3


@pytest.mark.parametrize("raw, spelt", [
    ("A  Dog.", "dog"), ("1,000", "1000"), ("black/white", "black white"), ("none", "0"), ("cant", "can't"),
    ("yes!", "yes"), ("3.5", "3.5"), ("t-shirt", "t shirt"), ("it's", "it's")])
def test_answers_are_spelt_as_the_official_evaluation_spells_them(raw, spelt):
    assert data.normalize_answer(" ".join(raw.split())) == spelt


def test_answer_lists(tmp_path):
    answers = ["b", "a", "c", "c", {"d": 1 / 3, "b": 1}]
    examples = [E(str(i), "v", "q", answer=answer) for i, answer in enumerate(answers)]
    assert data.answer_list(examples, 3) == ["b", "c", "a"]
    assert data.read_answer_list(tmp_path) is None
    save(tmp_path, "train_ans2label.json", {"man": 1, "woman": 0})
    assert data.read_answer_list(tmp_path) == ["woman", "man"]
    for wrong in ({"a": 0, "b": 2}, {"a": 0, "b": 0}, {"a": "0"}, {}):
        save(tmp_path, "train_ans2label.json", wrong)
        assert "each used once" in refused(data.read_answer_list, tmp_path)


def test_captions_that_are_blank_or_have_no_image(tmp_path, capsys):
    save(tmp_path, "captions_train2014.json", COCO)
    assert len(read("pretrain", tmp_path, "train")) == 2
    assert "captions_train2014.json: left out 1 blank captions" in capsys.readouterr().err
    save(tmp_path, "captions_train2014.json", COCO | {"images": COCO["images"][1:]})
    assert "annotations[1]: image_id '1' has no match in the other list" in refused(read, "pretrain", tmp_path, "train")


# ---------------------------------------------------------------- what is wrong is named, with its line
GOOD = '{"question": "q ?", "answer": "a", "video_id": "v"}'
MALFORMED = {  # task, split, file: what it says, the place and the words of its error
    ("tgif_qa", "train", "Train_action_question.csv"): [
        *[(f"{ACTION}\r\n{WAVES}\r\n{line}\r\n{JUMPS.replace('N2', 'N3')}\r\n", ":3: ", what) for line, what in [
            (JUMPS.replace("\t0\t", "\t5\t"), "answer should be a whole number from 0 to 4, is '5'"),
            *[(JUMPS.replace("\t0\t", f"\t{wrong}\t"), f"is '{wrong}'") for wrong in ("-1", "0.0", "")],
            (JUMPS.replace("\t0\t", "\t\u0663\t"), "whole number"),  # int() reads Arabic digits
            (JUMPS.replace("\tnod", ""), "9 columns where the header has 10"),
            (JUMPS + "\tmore", "11 columns"),
            (JUMPS.replace("\tnod", "\t "), "option 4 is blank"),
            (JUMPS.replace("What does the dog do ?", " "), "question is blank"),
            (JUMPS.replace("dog", "d\0g"), "not text"),
            (JUMPS.replace("dog", "d" * 30_000), "question has more than 20,000 characters"),
            (f"../{JUMPS}", "'../g2': a media name must stay inside"),
            ("", "1 columns"),
        ]],
        *[(empty, ": ", "no examples") for empty in ("", ACTION)],
        (f"{WAVES}\n{JUMPS}", ":2: ", "path or gif_name or clip_name or"),
        (f"{ACTION.replace('answer', 'solution')}\n{WAVES}", ":2: ", "answer is missing"),
        (f"{ACTION.replace('a2', 'a1')}\n{WAVES}", ":1: ", "two columns have the same name"),
        (f"{ACTION.replace('a2', 'b2')}\n{WAVES}", ":2: ", "a2 is missing"),
        (f"{ACTION}\n{WAVES}\n{JUMPS.replace('dog', 'chién')}".encode("latin-1"), ":3: ", "not UTF-8"),
        (f"{ACTION}\n{WAVES}".encode("utf-16"), ":1: ", "not UTF-8"),
    ],
    ("msrvtt_qa", "train", "train.jsonl"): [(f"{GOOD}\r\n{line}\n{GOOD}\n\n", ":2: ", what) for line, what in [
        ('{"question": "q", ', "Expecting property name"),
        ('["question"]', "expected {key: value}, found list"),
        ('{"question": 7, "answer": "a", "video_id": "v"}', "question should be text, is 7"),
        ('{"question": "q", "answer": 7, "video_id": "v"}', "answer should be text, is 7"),
        ('{"question": "q", "answer": null, "video_id": "v"}', "answer is missing"),
        ('{"question": "q", "answer": NaN, "video_id": "v"}', "answer should be text, is nan"),
        ('{"question": "q", "answer": "a"}', "path or gif_name or clip_name or video or"),
        ('{"question": "\\ud800", "answer": "a", "video_id": "v"}', "not text"),
        ('{"question": "q\\u0000", "answer": "a", "video_id": "v"}', "not text"),
        ('{"question": "q", "answer": "a", "video_id": true}', "video_id should be text, is True"),
        ("[" * 100_000, "recursion"),
        ("9" * 5000, "digits"),
        ("", "Expecting value"),
    ]],
    ("msrvtt_mc", "test", "mc_test.jsonl"): [  # what is no index is never guessed
        ([{"clip_name": "v", "options": list("abcde"), "answer": wrong}], ":1: ", "answer")
        for wrong in (True, 2.0, "1_0", -1, 5, [1], None, 10**30)
    ],
}  # fmt: skip


@pytest.mark.parametrize("row", [(*where, *row) for where, rows in MALFORMED.items() for row in rows])
def test_what_is_malformed_is_named_with_its_place(tmp_path, row):
    task, split, file, content, place, what = row
    path = save(tmp_path, file, content)
    message = refused(read, task, tmp_path, split)
    assert message.startswith(f"{path}{place}") and what in message


def test_rows_that_two_lists_join_must_belong_together_one_by_one(tmp_path):
    vqa(tmp_path, ["yes"] * 9)
    assert "questions[0]: expected the answers of 10 people, found 9" in refused(read, "vqa", tmp_path, "train")
    row = {"question_id": 90, "image_id": 9, "answers": [{"answer": "no"}] * 10}
    for annotations, what in (
        ([row, row], "annotations[1]: question_id '90' is there twice"),
        ([row, row | {"question_id": 91}], "questions[0]: 1 annotations have no match in questions"),
        ([row | {"image_id": 8}], "questions[0]: question_id '90' has no match in the other list"),
        ([], "questions[0]: question_id '90' has no match in the other list"),
        ({}, "annotations should be a list, is dict"),
    ):
        save(tmp_path, "v2_mscoco_train2014_annotations.json", {"annotations": annotations})
        assert what in refused(read, "vqa", tmp_path, "train")


# ---------------------------------------------------------------- names to files
def test_find_media(tmp_path):
    for name in ("gifs/tumblr_1.gif", "videos/video0.jpg", "videos/video0.mp4", "images/COCO_val2014_000000000009.jpg",
                 "a.jpg", "x/y z.mp4", "x/y z.webm", "images/000000000007.jpg", "videos/b.mov.mp4", "4.mp4",
                 "videos/v.m3u8", "-x.mp4"):
        save(tmp_path, name, "")
    for name, found in {"tumblr_1": "gifs/tumblr_1.gif", "tumblr_1.gif": "gifs/tumblr_1.gif",
                        "video0": "videos/video0.mp4", "video0.avi": "videos/video0.mp4",
                        "videos/video0.mp4": "videos/video0.mp4", "a.JPG": "a.jpg",
                        "000000000009": "images/COCO_val2014_000000000009.jpg", "x/y z.webm": "x/y z.webm",
                        "COCO_train2014_000000000007.jpg": "images/000000000007.jpg", "b.mov": "videos/b.mov.mp4",
                        "-x.mp4": "-x.mp4"}.items():
        assert data.find_media(tmp_path, name) == tmp_path / found, name
    long = "x" * 5000
    for name in ("video1", "4.jpg", "v", "v.m3u8", "9", "video0.mp4/", "", ".", long, long + "/y", "concat:a|b"):
        assert data.find_media(tmp_path, name) is None, name[:20]


@pytest.mark.parametrize("name", [
    "../secret.mp4", "videos/../../secret.mp4", "/etc/passwd", "..\\secret.mp4", "C:\\secret.mp4",
    "\\\\host\\secret.mp4", "a\0.mp4", "linked", "away/secret.mp4"])
def test_media_names_never_leave_the_folder(tmp_path, name):
    save(tmp_path, "secret.mp4", "")
    save(tmp_path, "data/own.mp4", "")
    (tmp_path / "data/linked.mp4").symlink_to(tmp_path / "secret.mp4")
    (tmp_path / "data/away").symlink_to(tmp_path)
    (tmp_path / "data/inside.mp4").symlink_to("own.mp4")
    assert "data folder" in refused(data.find_media, tmp_path / "data", name)
    assert data.find_media(tmp_path / "data", "inside")


# ---------------------------------------------------------------- several folders
def test_annotations_one_folder_deeper_and_several_folders(tmp_path):
    save(tmp_path, "one/dataset/Train_action_question.csv", f"{ACTION}\n{WAVES}\n")
    save(tmp_path, "one/gifs/g1.gif", "")
    save(tmp_path, "two/Train_action_question.csv", f"{ACTION}\n{JUMPS}\n")
    save(tmp_path, "two/.old/Train_action_question.csv", "")
    examples = read("tgif_qa", [tmp_path / "one", tmp_path / "two"], "train")
    assert [(e.video, e.path) for e in examples] == [("g1", str(tmp_path / "one/gifs/g1.gif")), ("g2", None)]
    save(tmp_path, "one/again/Train_action_question.csv", "")
    assert "dataset/Train_action_question.csv both fit" in refused(read, "tgif_qa", tmp_path / "one", "train")


# ---------------------------------------------------------------- the verbatim samples
SAMPLES = [  # file, the task and split that it is for, examples in it
    *[(f"tgif_qa/Test_{kind}_question.csv", f"tgif_qa_{kind}", "test", 200)
      for kind in ("action", "transition", "frameqa", "count")],
    *[(f"tgif_qa/Train_{kind}_question.csv", f"tgif_qa_{kind}", "train", 200) for kind in ("action", "count")],
    ("msrvtt_retrieval/MSRVTT_JSFUSION_test.csv", "msrvtt_retrieval", "test", 1000),
    ("msrvtt_retrieval/MSRVTT_train.7k.csv", "msrvtt_retrieval", "train", 4000),
    ("msrvtt_retrieval/train_val_videodatainfo.first200videos.json", "pretrain", "train", 4000),
    ("msrvtt_retrieval/test_videodatainfo.first200videos.json", "pretrain", "test", 4000),
    ("msrvtt_retrieval/msrvtt_caption_test.first200.json", "pretrain", "test", 4000),
    ("msrvtt_qa/msrvtt_qa_val.jsonl", "msrvtt_qa", "val", 200),
    *[(f"msvd_qa/{split}_qa.first200.json", "msrvtt_qa", split, 200) for split in ("train", "val", "test")],
    ("didemo/val_data.first200.json", "didemo_retrieval", "val", 181),  # videos of its 200 descriptions
    ("didemo/test_data.first200.json", "didemo_retrieval", "test", 174),
    *[(f"activitynet_captions/{name}.first200videos.json", "activitynet_retrieval", split, 200)
      for name, split in (("train", "train"), ("val_1", "test"), ("val_2", "val_2"))],
    ("activitynet_captions/val_1.csv", "activitynet_retrieval", "test", 56),  # videos of its 200 sentences
    *[(f"vqa_v2/annotations_{name}.first200.json", "vqa", split, 200)
      for name, split in (("train", "train"), ("valid", "val"), ("test", "test"))],
    ("vqa_v2/official_toplevel_annotations.json", "vqa", "train", 3),
    ("coco_captions/captions_val2017.first200images.json", "pretrain", "val", 1001),
    ("coco_captions/coco_mini_captions_train2017.json", "pretrain", "train", 400),
    ("coco_captions/coco_mini_captions_val2017.json", "pretrain", "val", 395),
]  # fmt: skip
BESIDE = {"MSRVTT_train.7k.csv": "train_val_videodatainfo.first200videos.json"}  # and VQA's questions


@pytest.mark.skipif(not (SHARED / "annotations").is_dir(), reason=f"no samples at {SHARED / 'annotations'}")
@pytest.mark.parametrize("file, task, split, count", SAMPLES, ids=[sample[0] for sample in SAMPLES])
def test_samples_parse_to_exactly_their_examples(tmp_path, file, task, split, count):
    path = SHARED / "annotations" / file
    for name in {path.name, BESIDE.get(path.name, path.name.replace("annotations", "questions"))}:
        public = name.replace("official_toplevel", "v2_train2014")
        shutil.copyfile(path.with_name(name), tmp_path / public)  # alone: nothing else in the folder can stand in
    assert len(read(task, tmp_path, split)) == count
