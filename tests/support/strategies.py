"""Strategies of Hypothesis: items, change sets, messages of a stream."""

from hypothesis import strategies as st

from relay.model.item import Item, Kind
from relay.model.payload import ChangeSet
from relay.protocol.sse import Event

keys = st.sampled_from(["a", "b", "c", "d/e", "ü"])
versions = st.integers(min_value=0, max_value=9)


@st.composite
def items(draw: st.DrawFn) -> Item:
    version = draw(versions)
    json = b'{"version":%d}' % version
    live = draw(st.booleans())
    return Item(draw(st.sampled_from(Kind)), draw(keys), version, json if live else None)


change_sets = st.builds(ChangeSet, st.lists(items(), max_size=6).map(tuple), full=st.booleans())

_line = st.text(st.characters(exclude_characters="\r\n\0", exclude_categories=["Cs"]), max_size=20)
_data = st.lists(_line, max_size=4).map("\n".join)

events = st.builds(
    Event, _line.filter(bool), _data.map(str.encode), st.sampled_from(["", "1", "77"])
)
