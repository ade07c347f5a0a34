"""Values that must stay as they are: answers of functions, marks, and attributes of many objects."""

from __future__ import annotations

from collections import OrderedDict, deque
from types import SimpleNamespace

from fastdp.capture.watch import Watch


def test_an_answer_that_is_another_is_named():
    now = [1.0]
    watch = Watch()
    watch.answer(lambda: now[0], "the number")
    assert watch.changed() == ""
    now[0] = 2.0
    assert watch.changed() == "the number"
    now[0] = 1.0
    assert watch.changed() == ""


def test_what_has_a_mark_is_asked_only_when_the_mark_has_moved():
    marks, hooks, asked = [0], ["one"], []

    def ask():
        asked.append(1)
        return list(hooks)

    watch = Watch()
    watch.answer(lambda: "same", "another answer")
    watch.answer(ask, "the hooks", lambda: marks[0])
    assert (watch.changed(), watch.changed(), len(asked)) == ("", "", 1)
    marks[0] += 1  # something else has moved it
    assert (watch.changed(), watch.changed(), len(asked)) == ("", "", 2)
    hooks.append("two")
    assert watch.changed() == ""  # nobody has moved the mark
    marks[0] += 1
    assert [watch.changed() for _ in range(2)] == ["the hooks"] * 2
    hooks.pop()
    assert watch.changed() == ""


def test_a_moved_mark_hides_no_other_change():
    marks, values = [0], {"rate": 0.1}
    watch = Watch()
    watch.values(values, ["rate"], "the layer")
    watch.answer(lambda: None, "the hooks", lambda: marks[0])
    marks[0], values["rate"] = 1, 0.2
    assert watch.changed() == "the layer.rate"


def test_an_attribute_of_many_is_compared_by_value_on_each():
    many = [SimpleNamespace(factor=factor, other=None) for factor in (1.0, 2.0, 3.0)]
    watch = Watch()
    for i, one in enumerate(many):
        watch.attribute_of_many(one, "factor", f"the factor of {i}")
        watch.attribute_of_many(one, "other", f"the other of {i}")
    many[1].factor = 2
    assert watch.changed() == ""
    many[1].factor = 5.0
    assert watch.changed() == "the factor of 1"
    many[1].factor = 2.0
    del many[2].other
    assert watch.changed() == "the other of 2"


def test_attributes_of_classes_are_restored_too():
    class Counter:
        calls, seen = 0, ["first"]

        def scaled(self):
            return 2

    given = Counter.scaled
    watch = Watch()
    watch.writable_by(attributes := vars(Counter), Counter)
    watch.values(attributes, ["calls"], "Counter")
    watch.object(attributes, "scaled", "Counter.scaled")
    watch.elements(Counter.seen, "Counter.seen")
    watch.size(attributes, "Counter")
    Counter.calls, Counter.more, Counter.scaled = 3, 1, lambda self: 3
    Counter.seen.append("second")
    watch.restore()
    assert (Counter.calls, Counter.scaled, Counter.seen) == (0, given, ["first"])
    assert not hasattr(Counter, "more")
    assert watch.changed() == ""


def test_containers_stay_the_same_objects_with_the_same_order():
    """Others refer to them, as torch's handles of hooks do to the dict of hooks."""
    table, nested = OrderedDict(a=1, b=2, c=3), {"deep": [[1, 2], (3, [4])]}
    owner = {"table": table, "nested": nested, "few": deque([1, 2], maxlen=2)}
    inner, few = nested["deep"][0], owner["few"]
    watch = Watch()
    watch.values(owner, list(owner), "the owner")
    watch.size(table, "the table")
    del table["a"]
    table["d"], owner["table"] = 4, {}
    nested["deep"][1][1].clear()
    nested["deep"].pop(0)
    inner.append(5)
    few.append(9)
    watch.restore()
    found = owner["table"], owner["nested"], owner["nested"]["deep"][0], owner["few"]
    assert [*map(id, found)] == [*map(id, (table, nested, inner, few))]
    assert list(table.items()) == [("a", 1), ("b", 2), ("c", 3)]
    assert (nested, list(few), few.maxlen) == ({"deep": [[1, 2], (3, [4])]}, [1, 2], 2)
    assert watch.changed() == ""


def test_keys_that_were_taken_out_come_back_to_their_places():
    hooks = OrderedDict(first=object(), second=object(), third=object())
    before = list(hooks.items())
    watch = Watch()
    for name in hooks:
        watch.object(hooks, name, name)
    watch.size(hooks, "the hooks")
    del hooks["first"]
    hooks["fourth"] = object()
    watch.restore()
    assert list(hooks.items()) == before
