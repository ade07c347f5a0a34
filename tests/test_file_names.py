"""The names of files: two or three words of a newcomer's question name one module, and it is the right one."""

from __future__ import annotations

import re
from pathlib import Path

import packages
import pytest

# A question, with the words in it that one would look for between asterisks, and the module that answers it.
QUESTIONS = {
    "Where is the *loss* of *merged* outputs?": "program/keras/loss/merged.py",
    "Where does the *engine* do the *rollback* of a failed update?": "engine/rollback.py",
    "What else does a *rollback* of a model's own *steps* put back?": "keras/steps/rollback.py",
    "Which *algorithm* reduces a bucket, NCCL or our kernels?": "comm/algorithm.py",
    "Where is gradient *accumulation* in the *engine*?": "engine/accumulation.py",
    "Where is a batch *scattered*?": "comm/scatter_merge.py",
    "Who lays *buffers* out flat?": "buffers.py",
    "How does a *keras* model get its *batch_norm* moments?": "program/keras/batch_norm.py",
    "What becomes of the *buffers* of a *torch* module?": "program/torch/module_buffers.py",
    "How does a *keras* *optimizer* act on *flat* buffers?": "program/keras/optimizer/flat.py",
    "Where is a step that *capture* takes up *traced*?": "capture/trace.py",
    "Which process *compiles* a captured step: the *worker*?": "capture/compile/worker.py",
    "Where does a *recording* become CUDA *graphs*?": "capture/cuda_graphs/recording.py",
    "Is compiled faster: where is the *speed* *trial*?": "capture/speed_trial.py",
    "What is the *reference* of a kernel?": "launch/reference.py",
    "Where is *nvrtc* called?": "launch/nvrtc.py",
    "What is a virtual *device* in *host* memory?": "runtime/host/device.py",
    "Which device does `gpus=` *select* at *runtime*?": "runtime/select.py",
    "Which *topology* has the box?": "runtime/topology.py",
    "Where does *cuda* *memory* come from?": "runtime/cuda/memory.py",
    "Where do *tensors* draw *random* numbers by row?": "tensors/random.py",
    "Where is *install* for unmodified scripts?": "keras/install.py",
    "Where is the next batch of *fit* *prefetched*?": "keras/fit/prefetch.py",
    "Where are old *h5* files *converted*?": "keras/h5_files/convert.py",
    "Where is the *timing* of the verbs?": "engine/timing.py",
    "What does the *engine* *report*?": "engine/report.py",
    "Where is the *parallel_model*?": "keras/parallel_model.py",
    "Where is the *monitor* of a fit?": "keras/callbacks/monitor.py",
    "Where is the *progress* bar of loops?": "monitoring/progress.py",
    "Which *rows* does a *probe* run?": "program/keras/rows/probe.py",
}


def modules_named(words: list[str]) -> list[str]:
    """The modules in whose path each of these words is one, inflected or not; those called by one of them, if any."""
    files = packages.modules()
    found = [file for file in files if all(any(_fits(word, part) for part in _parts(file)) for word in words)]
    return [file for file in found if Path(file).stem in words] or found


def _parts(file: str) -> set[str]:
    """The names in a path, and the words in them."""
    names = file.removesuffix(".py").split("/")
    return {*names, *(word for name in names for word in name.split("_"))}


def _fits(word: str, part: str) -> bool:
    """Whether a word is this part, or an inflected form of it."""
    stem = part.removesuffix("e")
    return word == part or re.fullmatch(rf"{re.escape(stem)}(e|ed|es|s|d|ing|r)", word) is not None


@pytest.mark.parametrize(("question", "answer"), QUESTIONS.items())
def test_the_words_of_a_question_name_one_module(question, answer):
    assert modules_named(re.findall(r"\*(\w+)\*", question)) == [answer]


def test_a_word_that_names_nothing_or_too_much_finds_nothing_or_too_much():
    assert modules_named(["banana"]) == []
    assert len(modules_named(["keras"])) > 20


def test_there_are_twenty_questions_at_least():
    assert len(QUESTIONS) >= 20
