"""The difference that a configuration makes to a running relay. Pure.

Environments that are listed change in place, with filters and databases, as do the options of
`_IN_PLACE`. Everything else was used when the relay was built: it stays as it is, and is named as
needing a restart.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterable, Iterator, Mapping

from msgspec import Struct, structs

from relay.config.options import Option, Support
from relay.config.schema import NAMED_SECTIONS, SECTIONS, Config, options
from relay.model.environment import EnvironmentSpec

_IN_PLACE = frozenset((("Main", "log_level"), ("Main", "reload")))
"""Options that change in place in every mode, by section and attribute."""

_OF_ENVIRONMENTS = frozenset(
    ("Main", each) for each in ("eval_streams", "bootstrap_from", "bootstrap_token")
)
"""Options of which listed environments are made; others have got them once for all."""

_STORES = ("redis", "consul", "dynamodb")
"""Attributes of a configuration of which the stores of listed environments are made."""

_WEBHOOK = ("Webhook", "secret")
"""Option that changes in place as long as it is set, because it makes a route."""


class Difference(Struct, frozen=True):
    """Configuration in force after it was read again, and its difference from before.

    Args:
        config: the new environments, filters and options that change in place, beside the former
            values of all others.
        stores: True if the databases of the environments have changed.
        documents: True if the places of their documents have changed.
        restart: each option that differs and needs a restart, as the file writes it, with the
            source of its new value: `[Main] port (/etc/ld-relay.conf:3)`.
    """

    config: Config
    stores: bool = False
    documents: bool = False
    restart: tuple[str, ...] = ()


def difference(before: Config, after: Config) -> Difference:
    """Return the difference that a configuration makes.

    Args:
        before: in force.
        after: read now.
    """
    are_listed = bool(before.environments and after.environments)
    in_force: dict[str, object] = {}
    sources = dict(after.sources)
    restart: list[str] = []
    attributes = {name.replace("_", ""): name for name in Config.__struct_fields__}
    for section, cls in SECTIONS.items():
        attribute = attributes.get(section.lower())
        # The fleet is where it was at the start, and whoever leads writes there.
        stays = attribute in _STORES and before.fleet.enabled
        if are_listed and attribute in (*_STORES, "publish") and not stays:
            in_force[attribute] = getattr(after, attribute)
        elif attribute is not None:
            old = getattr(before, attribute)
            new = getattr(after, attribute)
            values, names, kept = _section(section, old or cls(), new or cls(), before, after)
            sources |= kept
            # A section that is not used stays so, whatever its defaults are.
            in_force[attribute] = structs.replace(old, **values) if old is not None else None
            restart += names
    if are_listed:
        in_force |= {"environments": after.environments, "filters": after.filters}
    else:
        restart += _named_sections(before, after)
    if _has_same_files(before, after):
        in_force["certificate"] = after.certificate
    config = structs.replace(before, **in_force, sources=sources, warnings=after.warnings)
    stores = any(getattr(config, each) != getattr(before, each) for each in _STORES)
    documents = _documents(config) != _documents(before)
    return Difference(config, stores, documents, tuple(restart))


def _documents(config: Config) -> tuple[object, ...]:
    """Return the options that say where documents are."""
    return config.publish, config.main.bootstrap_from, config.main.bootstrap_token


def _has_same_files(before: Config, after: Config) -> bool:
    """Return whether the server's certificate is in the same files."""
    one, other = before.main, after.main
    return (one.tls_enabled, one.tls_cert, one.tls_key) == (
        other.tls_enabled,
        other.tls_cert,
        other.tls_key,
    )


def same(one: Config, other: Config) -> bool:
    """Return whether two configurations differ in nothing but comments, lines and warnings."""
    bare = [structs.replace(each, sources={}, warnings=(), files=()) for each in (one, other)]
    return bare[0] == bare[1]


def _section(
    section: str, old: object, new: object, before: Config, after: Config
) -> tuple[Mapping[str, object], list[str], Mapping[str, str]]:
    """Compare the options of a section.

    Returns:
        The values that change in place, the options that need a restart as `Difference` names
        them, and the sources that these have had so far.
    """
    values: dict[str, object] = {}
    sources: dict[str, str] = {}
    restart = []
    for option in options(section):
        former, value = getattr(old, option.attribute), getattr(new, option.attribute)
        if former == value:
            continue
        if option.support is not Support.FULL or _in_place(option, before, after):
            values[option.attribute] = value
            continue
        label = f"{section}.{option.attribute}"
        if label in before.sources:
            sources[label] = before.sources[label]
        if label in before.sources or label in after.sources:  # else it follows from another
            restart.append(_named(f"[{section}] {option.name}", after.sources.get(label)))
    return values, restart, sources


def _in_place(option: Option, before: Config, after: Config) -> bool:
    key = option.section, option.attribute
    if key in _OF_ENVIRONMENTS:
        return bool(before.environments and after.environments)
    if key == _WEBHOOK:
        return bool(before.webhook.secrets and after.webhook.secrets)
    return key in _IN_PLACE


def _named(option: str, source: str | None) -> str:
    return f"{option} ({source})" if source else option


def _named_sections(before: Config, after: Config) -> Iterator[str]:
    """Yield the environments and filters that would come or go."""
    for section in NAMED_SECTIONS:
        old, new = _names(before, section), _names(after, section)
        for name in dict.fromkeys((*old, *new)):
            if (name in old) != (name in new):
                yield _named(f'[{section} "{name}"]', after.sources.get(f'{section} "{name}"'))


def _names(config: Config, section: str) -> tuple[str, ...]:
    if section == "Filters":
        return tuple(config.filters)
    return tuple(each.name for each in config.environments)


def continued(
    before: Iterable[EnvironmentSpec], after: Iterable[EnvironmentSpec]
) -> Mapping[str, str]:
    """Return which environments go on: former names by new ones.

    An environment is the same if its SDK key is, or else if its name is and nothing says that
    LaunchDarkly knows it as another one: then its key was rotated.

    Args:
        before: environments so far, each name once.
        after: environments from now on, each name once.
    """
    free = {each.name: each for each in before}
    names = frozenset(free)
    after = tuple(after)
    result: dict[str, str] = {}
    rules: tuple[Callable[[EnvironmentSpec], Hashable], ...] = (
        lambda spec: (spec.name, spec.sdk_key, spec.payload_filter),
        lambda spec: (spec.sdk_key, spec.payload_filter),
        lambda spec: spec.name,
    )
    for identity in rules:
        known = {identity(old): old for old in free.values()}
        for new in after:
            old = known.get(identity(new))
            if new.name in result or old is None or old.name not in free:
                continue
            if _have_same_data(old, new) or not _contradict(old, new):
                del free[old.name]
                result[new.name] = old.name
    taken = frozenset(result.values())
    for new_name, name in tuple(result.items()):
        # A name that another one gives up only in the same moment cannot be taken.
        if new_name != name and new_name in names and new_name in taken:
            del result[new_name]
    return result


def _have_same_data(old: EnvironmentSpec, new: EnvironmentSpec) -> bool:
    return (old.sdk_key, old.payload_filter) == (new.sdk_key, new.payload_filter)


def _contradict(old: EnvironmentSpec, new: EnvironmentSpec) -> bool:
    """Return whether two specs name different environments of LaunchDarkly."""
    pairs = (
        (old.environment_id, new.environment_id),
        (old.project_key, new.project_key),
        (old.environment_key, new.environment_key),
    )
    different = any(one and other and one != other for one, other in pairs)
    return different or old.payload_filter != new.payload_filter
