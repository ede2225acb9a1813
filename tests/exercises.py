"""Exercises that have no function of their own in the project: what its loops do in passing, or in another way. The
other exercises are functions of clipbert.py, data.py and finetune.py (see ASSIGNMENT.md).
"""

import torch

import clipbert


def evaluate(model, questions, read, n_test, how, at_once=16):
    """Accuracy, in percent, with n_test clips a video (paper, section 4).

        p = G(p_1, ..., p_N),   N = n_test;   the prediction is the answer, or the option, with the highest p

    questions: a list of (video, input_ids (n, Lt), attention_mask (n, Lt), right answer): with n = 1 text its K scores
    are those of K answers; with n > 1 texts, the options of a multiple choice, each has one score (K = 1).
    read(video, n_test) -> all of its clips (n_test, T, 3, L, L). how: see clipbert.aggregate_clips.
    at_once: no more clips than that go through the model in one call. The last call may have fewer.
    The model is left in the mode it was in, training or testing.
    """
    was_training, right = model.training, 0
    model.eval()
    with torch.no_grad():
        for video, ids, mask, answer in questions:
            parts = read(video, n_test).split(at_once)
            logits = [clipbert.clip_logits(model, part[None], ids, mask) for part in parts]  # (clips, n, K) each
            p = clipbert.aggregate_clips(torch.cat(logits), how)  # (1, K), or of options (n, 1)
            right += int(p.argmax() == answer)
    model.train(was_training)
    return 100 * right / len(questions)


def match_captions(images, captions, generator):
    """A batch for image-text matching: replace about half of the captions by wrong ones (paper, section 3).

    images: a list of B names; captions: the list of their B captions. An image may be there more than once, with other
    captions. Each caption, whatever happens to the others, is replaced with probability 1/2: by one of the captions of
    this batch that are not said of its image, each place in the batch equally likely. Capital letters make no
    difference to what is said.
    Where there is none, it stays. -> a new list of B captions; B labels (a list of ints): 1 where the caption is its
    image's own, 0 where it is another's. All random numbers come from the generator.
    """
    texts, labels = list(captions), [1] * len(captions)
    for i, image in enumerate(images):
        own = {text.lower() for name, text in zip(images, captions, strict=True) if name == image}
        others = [text for text in captions if text.lower() not in own]
        if torch.rand((), generator=generator) < 0.5 and others:
            texts[i] = others[torch.randint(len(others), (), generator=generator)]
            labels[i] = 0
    return texts, labels
