"""Patches of a library: in place while they are used, undone in order, whoever else patches the same place."""

from __future__ import annotations

import random
import threading
import time
import types

import pytest

from fastdp.patching import Patch


class Base:
    def inherited(self):
        return "base"


class Owner(Base):
    def own(self):
        return "own"

    @staticmethod
    def static():
        return "static"


OWNERS = dict(vars(Owner))


@pytest.fixture(autouse=True)
def nothing_is_left():
    yield
    left, in_place = dict(vars(Owner)), list(Patch._in_place)
    for name in set(left) - set(OWNERS):
        delattr(Owner, name)
    for name in ("own", "static"):
        setattr(Owner, name, OWNERS[name])
    Patch._in_place.clear()
    assert left == OWNERS
    assert not in_place


def wrapping(word, order=None):
    """What makes a replacement that puts a word before what the original gives."""

    def replacement_of(original):
        if order is not None:
            order.append(word)
        return lambda *args: f"{word} {original(*args)}"

    return replacement_of


def test_the_replacement_is_there_while_the_patch_is_used():
    patch = Patch([(Owner, "own", wrapping("new"))])
    with patch:
        assert Owner().own() == "new own"
    assert Owner().own() == "own"


def test_a_module_is_patched_as_a_class_is():
    module = types.ModuleType("module")
    module.name = "old"
    with Patch([(module, "name", lambda old: f"new for {old}")]):
        assert module.name == "new for old"
    assert module.name == "old"


def test_only_the_last_user_takes_the_replacement_out():
    patch = Patch([(Owner, "own", wrapping("new"))])
    with patch:
        with patch:
            assert Owner().own() == "new own"  # not twice
        assert Owner().own() == "new own"
    assert Owner().own() == "own"


def test_an_error_in_its_body_ends_a_use():
    with pytest.raises(KeyError), Patch([(Owner, "own", wrapping("new"))]):
        raise KeyError
    assert Owner().own() == "own"


def test_changes_are_made_in_order_and_those_of_one_place_are_undone_in_reverse():
    order = []
    patch = Patch([(Owner, "own", wrapping("first", order)), (Owner, "own", wrapping("second", order))])
    with patch:
        assert Owner().own() == "second first own"
    assert order == ["first", "second"]


def test_an_inherited_function_is_inherited_again():
    with Patch([(Owner, "inherited", wrapping("new"))]):
        assert (Owner().inherited(), Base().inherited()) == ("new base", "base")
    assert "inherited" not in vars(Owner)
    assert Owner().inherited() == "base"


def test_a_static_function_is_static_again():
    with Patch([(Owner, "static", lambda original: staticmethod(lambda: f"new {original()}"))]):
        assert Owner().static() == "new static"
    assert isinstance(vars(Owner)["static"], staticmethod)


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt])
def test_a_change_that_fails_undoes_those_before_it(error):
    def fails(original):
        raise error

    changes = [(Owner, "own", wrapping("new")), (Owner, "inherited", wrapping("new")), (Owner, "static", fails)]
    patch = Patch(changes)
    for _ in range(2):
        with pytest.raises(error):
            patch.enter()
        assert (Owner().own(), Owner().inherited(), Owner.static()) == ("own", "base", "static")


def test_an_empty_place_is_an_error_that_changes_nothing():
    patch = Patch([(Owner, "own", wrapping("new")), (Owner, "missing", wrapping("new"))])
    with pytest.raises(AttributeError, match="missing"):
        patch.enter()
    assert Owner().own() == "own"


def test_leaving_too_often_is_an_error():
    patch = Patch([(Owner, "own", wrapping("new"))])
    with pytest.raises(RuntimeError, match="more often"):
        patch.leave()
    with patch:
        assert Owner().own() == "new own"


def test_a_replacement_is_made_once_as_long_as_the_same_is_there():
    made = []
    patch = Patch([(Owner, "own", wrapping("new", made))])
    for _ in range(3):
        with patch:
            assert Owner().own() == "new own"
    assert made == ["new"]
    before = Owner.own
    Owner.own = lambda self: "other"
    try:
        with patch:
            assert Owner().own() == "new other"
        assert Owner().own() == "other"
    finally:
        Owner.own = before
    with patch:
        assert Owner().own() == "new own"


def test_the_places_of_a_patch_are_known_whether_it_is_in_place_or_not():
    patch = Patch([(Owner, "own", wrapping("new")), (Base, "inherited", wrapping("new"))])
    assert patch.places == {(Owner, "own"), (Base, "inherited")}
    with patch:
        assert patch.places == {(Owner, "own"), (Base, "inherited")}


@pytest.mark.parametrize("ends", ["in turn", "as they came"])
def test_two_patches_of_a_place_end_in_any_order(ends):
    first, second = Patch([(Owner, "own", wrapping("first"))]), Patch([(Owner, "own", wrapping("second"))])
    for _ in range(2):
        first.enter()
        second.enter()
        assert Owner().own() == "second first own"
        for patch in (first, second) if ends == "as they came" else (second, first):
            patch.leave()
        assert Owner().own() == "own"


def test_three_patches_end_in_any_order_and_begin_again_in_between():
    patches = [Patch([(Owner, "own", wrapping(word))]) for word in ("one", "two", "three")]
    generator = random.Random(0)
    for _ in range(200):
        in_place = []
        for _ in range(8):
            patch = generator.choice(patches)
            if patch in in_place:
                in_place.remove(patch)
                patch.leave()
            else:
                in_place.append(patch)
                patch.enter()
        for patch in in_place:
            patch.leave()
        assert Owner().own() == "own"


def test_what_others_have_put_on_top_stays_and_calls_what_is_below():
    patch = Patch([(Owner, "own", wrapping("new"))])
    patch.enter()
    below = Owner.own
    Owner.own = lambda self: f"others' {below(self)}"
    theirs = Owner.own
    patch.leave()
    assert Owner.own is theirs
    assert Owner().own() == "others' new own"  # so a replacement has to know whether it is wanted
    Owner.own = OWNERS["own"]


def test_many_threads_use_a_patch_and_none_finds_it_gone():
    def slowly(original):
        time.sleep(0.0005)
        return wrapping("new")(original)

    patch = Patch([(Owner, "own", wrapping("new")), (Owner, "inherited", slowly)])
    wrong = []
    begin = threading.Barrier(8)

    def work(seed):
        generator = random.Random(seed)
        begin.wait(10)
        for _ in range(100):
            with patch:
                if generator.random() < 0.5:
                    with patch:
                        pass
                if (Owner().own(), Owner().inherited()) != ("new own", "new base"):
                    wrong.append(seed)

    threads = [threading.Thread(target=work, args=(seed,)) for seed in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert wrong == []
    assert Owner().own() == "own"
