"""Reads a viewer's SDP offer and writes the answer: one video section is served, every other section is rejected. Pure.

aiortc negotiates the served section alone, and knows nothing of the others.

Sources: RFC 8866 for SDP, RFC 8829 for answers and rejected sections, RFC 9143 for BUNDLE, RFC 5888 for groups,
RFC 6184 for H.264, RFC 8840 for trickled candidates.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass, field, replace

from server.media.h264 import answered_profile

DIRECTIONS = ("sendrecv", "sendonly", "recvonly", "inactive")
DYNAMIC_PAYLOAD_TYPES = range(96, 128)
"""aiortc answers other numbers with ones of its own."""
MID_EXTENSION = "urn:ietf:params:rtp-hdrext:sdes:mid"
TRANSPORT = (
    ("ice-ufrag", "ice-pwd", "ice-options", "candidate", "end-of-candidates"),
    ("fingerprint",),
    ("setup",),
    ("rtcp-mux", "rtcp"),
)
"""Attributes of the transport, by groups of which the first is always present. Bundled sections share them."""


class InvalidOfferError(ValueError):
    """The offer cannot be answered; the text says why."""


class NoCommonCodecError(ValueError):
    """The offer has no codec that the server sends; the text says what to offer."""


@dataclass(frozen=True, slots=True)
class Section:
    """One media section of a session description."""

    kind: str
    port: int
    protocol: str
    formats: tuple[str, ...]
    lines: tuple[str, ...]
    """All lines after the first."""

    def values(self, name: str) -> list[str]:
        """The values of an attribute, in order; of a flag the empty string."""
        return attribute_values(self.lines, name)

    def value(self, name: str) -> str:
        """The first value of an attribute; empty if there is none."""
        return next(iter(self.values(name)), "")

    @property
    def mid(self) -> str:
        return self.value("mid")

    def without(self, *names: str) -> tuple[str, ...]:
        """The lines without these attributes."""
        return tuple(line for line in self.lines if attribute_name(line) not in names)

    def first_line(self, port: int) -> str:
        return f"m={self.kind} {port} {self.protocol} {' '.join(self.formats)}"


@dataclass(frozen=True, slots=True)
class Served:
    """The section that is served, as aiortc gets it, and what the answer says about its H.264."""

    index: int
    section: Section
    bundled: bool
    carrier: int | None
    """Index of the section that carries the served one's transport, if that is another (RFC 9143, section 7.3.1)."""
    profiles: dict[str, str] = field(default_factory=dict)
    """The answered `profile-level-id`s by payload type."""
    asymmetric: frozenset[str] = frozenset()
    """The payload types that were offered with `level-asymmetry-allowed=1`."""


class Offer:
    """A viewer's offer."""

    def __init__(self, text: str) -> None:
        """Raises `InvalidOfferError`."""
        self.session, self.sections = parse_sections(text)
        groups = [value.split() for value in attribute_values(self.session, "group")]
        if any(len(set(group)) < len(group) for group in groups):
            raise InvalidOfferError("a group names a section twice")
        mids = [section.mid for section in self.sections if section.mid]
        if len(set(mids)) < len(mids):
            raise InvalidOfferError("two sections have one `mid`")
        self._bundles = [group[1:] for group in groups if group[:1] == ["BUNDLE"]]

    def serve(self, level: int | None) -> Served:
        """Choose the first video section that can receive a codec of ours.

        `level` is the stream's level_idc in H.264; None if it is not known yet, so that H.264 cannot be answered.

        Raises `InvalidOfferError` or `NoCommonCodecError`.
        """
        videos = [(index, each) for index, each in enumerate(self.sections) if each.kind == "video"]
        if not videos:
            raise InvalidOfferError("it has no video section")
        usable = [(index, section) for index, section in videos if self._receives(section)]
        if not usable:
            raise InvalidOfferError("its video must be recvonly")
        for index, section in usable:
            served = self._with_our_formats(index, section, level)
            if served.section.formats:
                return served
        message = "The offer has no codec that the server sends: offer VP8 or H.264 with packetization-mode=1."
        if level and any(
            re.match(r"\S+ H264/", each, re.I) for _, section in usable for each in section.values("rtpmap")
        ):
            message += (
                f" H.264 is sent in Constrained Baseline at level {level / 10}; offers of a lower level need"
                " level-asymmetry-allowed=1."
            )
        raise NoCommonCodecError(message)

    def alone(self, served: Served) -> str:
        """The offer with the served section as its only one, which has a `mid` and the attributes of its transport."""
        session = [line for line in self.session if attribute_name(line) not in ("group", *DIRECTIONS)]
        lines = [*session, served.section.first_line(served.section.port or 9), *served.section.lines]
        return "\r\n".join(lines) + "\r\n"

    def answer(self, text: str, served: Served) -> str:
        """The answer to the whole offer, from the answer `text` to the served section alone.

        Every other section is rejected with port 0 (RFC 8829, section 5.3.1), except one that carries the transport:
        with `bundlePolicy: "max-bundle"` browsers cannot do without it, so it is inactive. There is a BUNDLE group only
        if the offer has the served section in one (RFC 5888, section 9.1).
        """
        session, [own] = parse_sections(text)
        mid = self.sections[served.index].mid
        session = tuple(line for line in session if attribute_name(line) != "group")
        carrier = "" if served.carrier is None else f"{self.sections[served.carrier].mid} "
        group = (f"a=group:BUNDLE {carrier}{mid}",) if served.bundled else ()
        lines = [*session, *group]
        for index, section in enumerate(self.sections):
            if index == served.index:
                kept = own.lines if mid else own.without("mid")
                lines += [own.first_line(own.port), *(_answered_format(line, served) for line in kept)]
            elif index == served.carrier:
                lines += _inactive(section, own)
            else:
                lines += _rejected(section, own)
        return "\r\n".join(lines) + "\r\n"

    def candidates(self, fragment: Sequence[str], served: Served) -> list[str]:
        """The candidates in the lines of an SDP fragment (RFC 8840) that belong to the served section's transport.

        Raises `ValueError` if the fragment has a username fragment that the offer does not have: an ICE restart.
        """
        users = {section.mid: section.value("ice-ufrag") for section in self.sections}
        own = served.section.value("ice-ufrag") or next(iter(attribute_values(self.session, "ice-ufrag")), "")
        known = {*users.values(), *attribute_values(self.session, "ice-ufrag")}
        found, user = [], own
        for line in fragment:
            name, _, value = line.removeprefix("a=").partition(":")
            if line.startswith("m="):
                user = own
            elif name == "ice-ufrag":
                if value.strip() not in known:
                    raise ValueError("an ICE restart")
                user = value.strip()
            elif name == "mid":
                user = users.get(value.strip()) or user
            elif name == "candidate" and user == own:
                found.append(line)
        return found

    def _receives(self, section: Section) -> bool:
        """Whether the section is enabled, and receives: by default its direction is `sendrecv` (RFC 8866, 6.7)."""
        bundled_only = "bundle-only" in map(attribute_name, section.lines) and self._bundle_of(section) is not None
        if section.port == 0 and not bundled_only:
            return False
        given = (*section.lines, *self.session)
        direction = next((name for name in map(attribute_name, given) if name in DIRECTIONS), "sendrecv")
        return direction in ("sendrecv", "recvonly")

    def _bundle_of(self, section: Section) -> list[str] | None:
        return next((bundle for bundle in self._bundles if section.mid and section.mid in bundle), None)

    def _with_our_formats(self, index: int, section: Section, level: int | None) -> Served:
        """The section with the formats that the server sends, and with a direction, a `mid` and its transport."""
        names = dict(value.partition(" ")[::2] for value in section.values("rtpmap"))
        parameters = {
            number: _parameters(text)
            for number, text in (value.partition(" ")[::2] for value in section.values("fmtp"))
        }
        kept: dict[str, str] = {}
        profiles: dict[str, str] = {}
        for number in section.formats:
            given = parameters.get(number, {})
            match names.get(number, "").strip().lower():
                case _ if not number.isdecimal() or int(number) not in DYNAMIC_PAYLOAD_TYPES:
                    continue
                case "vp8/90000":
                    kept[number] = ""
                case "h264/90000":
                    profile = answered_profile(given, level) if given.get("packetization-mode") == "1" else None
                    if profile is None:
                        continue
                    kept[number], profiles[number] = "", profile
                case "rtx/90000":
                    kept[number] = given.get("apt", "none")
        # A retransmission goes with the format that it repeats, wherever it stands.
        formats = tuple(number for number, repeats in kept.items() if not repeats or repeats in kept)
        asymmetric = frozenset(each for each in profiles if parameters[each].get("level-asymmetry-allowed") == "1")
        lines = []
        for line in (*section.without("mid", "bundle-only", *DIRECTIONS), *self._inherited(section)):
            name = attribute_name(line)
            number, _, text = line.partition(":")[2].partition(" ")
            if name in ("rtpmap", "fmtp", "rtcp-fb") and number in section.formats and number not in formats:
                continue
            if name == "extmap" and MID_EXTENSION in line and not section.mid:
                continue
            lines.append(_fmtp(number, _parameters(text)) if name == "fmtp" else line)
        lines += ["a=recvonly", f"a=mid:{section.mid or 0}"]
        alone = replace(section, formats=formats, lines=tuple(lines))
        return Served(index, alone, self._bundle_of(section) is not None, self._carrier(section), profiles, asymmetric)

    def _tagged(self, section: Section) -> Section:
        """The first section of the section's BUNDLE group, whose transport the others share; else the section."""
        bundle = self._bundle_of(section)
        return next((each for each in self.sections if bundle and each.mid == bundle[0]), section)

    def _carrier(self, section: Section) -> int | None:
        """The index of the section without which this one may have no transport.

        A browser's offer does not say whether its sections have transports of their own too, but those have candidates.
        """
        tagged = self._tagged(section)
        own = section.port and (section.values("candidate") or section.value("ice-ufrag") != tagged.value("ice-ufrag"))
        return None if tagged is section or own or not tagged.port else self.sections.index(tagged)

    def _inherited(self, section: Section) -> list[str]:
        """The attributes of the transport that the section leaves to the first one of its BUNDLE group."""
        tagged = self._tagged(section)
        given = {attribute_name(line) for line in (*section.lines, *self.session)}
        missing = {name for names in TRANSPORT if names[0] not in given for name in names}
        return [line for line in tagged.lines if tagged is not section and attribute_name(line) in missing]


def parse_sections(text: str) -> tuple[tuple[str, ...], list[Section]]:
    """The lines of the session, and its media sections. Raises `InvalidOfferError`."""
    session: list[str] = []
    sections: list[tuple[re.Match[str], list[str]]] = []
    for line in text.splitlines():
        if line.startswith("m="):
            match = re.fullmatch(r"m=([!-~]+) (\d{1,5})(?:/\d+)? ([!-~]+) ([ -~]+)", line)
            if match is None or ("RTP/" in match[3] and not all(map(_is_payload_type, match[4].split()))):
                raise InvalidOfferError("it cannot be parsed")
            sections.append((match, []))
        elif line:
            (sections[-1][1] if sections else session).append(line)
    return tuple(session), [
        Section(match[1], int(match[2]), match[3], tuple(match[4].split()), tuple(lines)) for match, lines in sections
    ]


def with_level(text: str, level: int) -> str:
    """A description of one sender of H.264, which states this level_idc for every format of it."""
    return re.sub(r"(?i)(profile-level-id=[0-9a-f]{4})[0-9a-f]{2}\b", rf"\g<1>{level:02x}", text)


def attribute_name(line: str) -> str:
    """The name of the attribute in a line; empty in any other line."""
    return line.removeprefix("a=").partition(":")[0].strip() if line.startswith("a=") else ""


def attribute_values(lines: Sequence[str], name: str) -> list[str]:
    """The values of an attribute in these lines."""
    return [line.partition(":")[2].strip() for line in lines if attribute_name(line) == name]


def _is_payload_type(text: str) -> bool:
    return text.isdecimal() and len(text) < 4 and int(text) < 128


def _parameters(text: str) -> dict[str, str]:
    """The parameters of an `fmtp` attribute. aiortc cannot read the blanks that some senders put between them."""
    pairs = (each.partition("=") for each in text.split(";") if each.strip())
    return {name.strip().lower(): value.strip() for name, _, value in pairs}


def _fmtp(number: str, parameters: dict[str, str]) -> str:
    return f"a=fmtp:{number} {';'.join(f'{name}={value}' if value else name for name, value in parameters.items())}"


def _answered_format(line: str, served: Served) -> str:
    """The line with H.264's parameters as the stream has them."""
    number, _, text = line.partition(":")[2].partition(" ")
    if attribute_name(line) != "fmtp" or number not in served.profiles:
        return line
    parameters = {**_parameters(text), "profile-level-id": served.profiles[number]}
    if number not in served.asymmetric:
        parameters.pop("level-asymmetry-allowed", None)
    return _fmtp(number, parameters)


def _inactive(section: Section, served: Section) -> list[str]:
    """A section that is accepted for its transport, which is that of the served one, and for no media."""
    lines = [section.first_line(served.port)]
    lines += [line for line in served.lines if line.startswith("c=")]
    lines += [] if section.kind == "application" else ["a=inactive"]
    kept = ("mid", "rtpmap", "fmtp", "sctp-port", "max-message-size")
    lines += [line for line in section.lines if attribute_name(line) in kept]
    transport = {name for names in TRANSPORT for name in names}
    return lines + [line for line in served.lines if attribute_name(line) in transport]


def _rejected(section: Section, served: Section) -> list[str]:
    """A rejected section. Browsers skip all but its first line; aiortc as a player reads formats and transport too."""
    lines = [section.first_line(0), "c=IN IP4 0.0.0.0", "a=inactive"]
    lines += [f"a=mid:{section.mid}"] if section.mid else []
    lines += [f"a=rtpmap:{value}" for value in section.values("rtpmap")]
    copied = {"ice-ufrag", "ice-pwd", "fingerprint", "setup", "rtcp-mux", "end-of-candidates"}
    if section.kind == served.kind:  # aiortc has one transport for both, and takes what the last section says of it
        copied.add("candidate")
    return lines + [line for line in served.lines if attribute_name(line) in copied]
