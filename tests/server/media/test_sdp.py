"""Offers of several sections and the answers to them, by RFC 8829, 8866, 9143 and 5888."""

import re

import pytest

from server.media.sdp import InvalidOfferError, NoCommonCodecError, Offer, with_level

TRANSPORT = (
    "a=ice-ufrag:{user}\r\na=ice-pwd:secretsecretsecretsecret\r\na=fingerprint:sha-256 AB:CD\r\na=setup:actpass\r\n"
    "a=rtcp-mux\r\n"
)
VP8 = "m=video {port} UDP/TLS/RTP/SAVPF 96 97\r\na=rtpmap:96 VP8/90000\r\na=rtpmap:97 rtx/90000\r\na=fmtp:97 apt=96\r\n"
AUDIO = "m=audio 9 UDP/TLS/RTP/SAVPF 111\r\na=rtpmap:111 opus/48000/2\r\na=fmtp:111 minptime=10\r\n"
DATA = "m=application 9 UDP/DTLS/SCTP webrtc-datachannel\r\na=sctp-port:5000\r\n"
OWN = (
    "v=0\r\no=- 1 1 IN IP4 0.0.0.0\r\ns=-\r\nt=0 0\r\na=group:BUNDLE 0\r\nm=video 5000 UDP/TLS/RTP/SAVPF 96 97\r\n"
    "c=IN IP4 10.0.0.1\r\na=sendonly\r\na=mid:0\r\na=ice-ufrag:ours\r\na=candidate:1 1 udp 9 10.0.0.1 5000 typ host\r\n"
)


def section(lines: str, mid: str = "", direction: str = "recvonly", user: str = "them", *, port: int = 9) -> str:
    lines = lines.replace("{port}", str(port)) + TRANSPORT.replace("{user}", user)
    return lines + (f"a=mid:{mid}\r\n" if mid else "") + (f"a={direction}\r\n" if direction else "")


def offer(*sections: str, session: str = "") -> str:
    return "v=0\r\no=- 1 1 IN IP4 0.0.0.0\r\ns=-\r\nt=0 0\r\n" + session + "".join(sections)


def answered(text: str, own: str = OWN) -> tuple[list[str], str | None]:
    """The first lines of the answer's sections, and what its BUNDLE group has."""
    given = Offer(text)
    answer = given.answer(own, given.serve(31))
    group = re.search(r"a=group:BUNDLE ?(.*)\r\n", answer)
    return re.findall(r"(m=\w+ \d+)", answer), group and group[1]


BUNDLE = "a=group:BUNDLE 0 1 2\r\n"


@pytest.mark.parametrize(
    ("sections", "expected", "group"),
    [
        ([section(VP8, "0")], ["m=video 5000"], "0"),
        ([section(VP8, "0"), section(DATA, "1", "")], ["m=video 5000", "m=application 0"], "0"),
        ([section(VP8, "0"), section(AUDIO, "1", "inactive")], ["m=video 5000", "m=audio 0"], "0"),
        ([section(VP8, "0"), section(VP8, "1")], ["m=video 5000", "m=video 0"], "0"),
        # Its own candidates, or a user of its own, say that the second has a transport of its own.
        (
            [section(AUDIO, "0"), section(VP8 + "a=candidate:1 1 udp 9 10.0.0.2 5000 typ host\r\n", "1")],
            ["m=audio 0", "m=video 5000"],
            "1",
        ),
        ([section(AUDIO, "0"), section(VP8, "1", user="others")], ["m=audio 0", "m=video 5000"], "1"),
        # Otherwise it may have only that of the first: Chromium's `max-bundle`, and RFC 9143's `bundle-only`.
        ([section(AUDIO, "0"), section(VP8, "1")], ["m=audio 5000", "m=video 5000"], "0 1"),
        ([section(DATA, "0", ""), section(VP8, "1")], ["m=application 5000", "m=video 5000"], "0 1"),
        (
            [section(AUDIO, "0"), VP8.replace("{port}", "0") + "a=bundle-only\r\na=mid:1\r\n"],
            ["m=audio 5000", "m=video 5000"],
            "0 1",
        ),
        ([section(VP8, "0", "sendonly"), section(VP8, "1", user="others")], ["m=video 0", "m=video 5000"], "1"),
        ([section(VP8, "0", port=0), section(VP8, "1", user="others")], ["m=video 0", "m=video 5000"], "1"),
    ],
)
def test_other_sections_are_rejected(sections: list[str], expected: list[str], group: str) -> None:
    mids = " ".join(str(number) for number in range(len(sections)))
    assert answered(offer(*sections, session=f"a=group:BUNDLE {mids}\r\n")) == (expected, group)


def test_a_bundled_section_takes_the_transport_of_the_first() -> None:
    """RFC 9143, section 7.1.3: a bundle-only section has no attributes of the transport."""
    text = offer(
        section(AUDIO + "a=candidate:1 1 udp 9 10.0.0.2 5000 typ host\r\n", "0"),
        VP8.replace("{port}", "0") + "a=bundle-only\r\na=mid:1\r\na=recvonly\r\n",
        session="a=group:BUNDLE 0 1\r\n",
    )
    given = Offer(text)
    alone = given.alone(given.serve(31))
    assert alone.count("m=") == 1
    for line in ("a=ice-ufrag:them", "a=fingerprint:sha-256 AB:CD", "a=setup:actpass", "a=rtcp-mux", "a=mid:1"):
        assert alone.count(f"{line}\r\n") == 1
    assert "a=candidate:1 1 udp" in alone
    assert "bundle-only" not in alone


def test_without_bundle_there_is_no_group() -> None:
    """RFC 5888, section 9.1: an answer groups nothing that the offer does not."""
    assert answered(offer(section(AUDIO, "0"), section(VP8, "1"))) == (["m=audio 0", "m=video 5000"], None)
    assert answered(offer(section(VP8, "0"), session="a=group:BUNDLE 1 2\r\n")) == (["m=video 5000"], None)


def test_a_section_without_mid_is_in_no_group() -> None:
    given = Offer(offer(section(VP8 + "a=extmap:1 urn:ietf:params:rtp-hdrext:sdes:mid\r\n"), session=BUNDLE))
    served = given.serve(31)
    assert "a=mid:0\r\n" in given.alone(served)  # aiortc needs one
    assert "sdes:mid" not in given.alone(served)
    answer = given.answer(OWN, served)
    assert "a=mid" not in answer
    assert "a=group" not in answer


@pytest.mark.parametrize("session", ["", "a=recvonly\r\n", "a=sendrecv\r\n"])
def test_without_a_direction_a_section_is_sendrecv(session: str) -> None:
    """RFC 8866, section 6.7; the session's direction is that of its sections."""
    given = Offer(offer(section(VP8, "0", ""), session=session))
    assert "a=recvonly\r\n" in given.alone(given.serve(31))


@pytest.mark.parametrize("session", ["a=sendonly\r\n", "a=inactive\r\n"])
def test_the_direction_of_the_session_counts(session: str) -> None:
    with pytest.raises(InvalidOfferError, match="must be recvonly"):
        Offer(offer(section(VP8, "0", ""), session=session)).serve(31)


H264 = (
    "m=video 9 UDP/TLS/RTP/SAVPF 102 103 104 105\r\na=rtpmap:102 H264/90000\r\na=rtcp-fb:102 nack\r\n"
    "a=fmtp:102 level-asymmetry-allowed={asymmetric}; packetization-mode=1; profile-level-id=42e00d\r\n"
    "a=rtpmap:103 rtx/90000\r\na=fmtp:103 apt=102\r\na=rtpmap:104 H264/90000\r\n"
    "a=fmtp:104 level-asymmetry-allowed=1;packetization-mode=0;profile-level-id=42e01f\r\n"
)


def test_a_level_that_cannot_be_kept_is_no_common_codec() -> None:
    """RFC 6184, section 8.2.2: without level-asymmetry-allowed the sender keeps to the offer's level."""
    with pytest.raises(NoCommonCodecError, match=r"level 2\.1.*level-asymmetry-allowed=1"):
        Offer(offer(section(H264.replace("{asymmetric}", "0"), "0"))).serve(21)
    served = Offer(offer(section(H264.replace("{asymmetric}", "0"), "0"), section(VP8, "1"))).serve(21)
    assert served.index == 1
    with pytest.raises(NoCommonCodecError):
        Offer(offer(section(H264.replace("{asymmetric}", "1"), "0"))).serve(None)


@pytest.mark.parametrize(("asymmetric", "level", "answer"), [("0", 13, "42e00d"), ("1", 21, "42e015")])
def test_the_answer_states_the_level(asymmetric: str, level: int, answer: str) -> None:
    given = Offer(offer(section(H264.replace("{asymmetric}", asymmetric), "0")))
    served = given.serve(level)
    assert served.section.formats == ("102", "103")
    assert "104" not in given.alone(served)
    own = OWN.replace("96 97", "102 103") + (
        "a=fmtp:102 level-asymmetry-allowed=1;packetization-mode=1;profile-level-id=42e01f\r\n"
    )
    [parameters] = re.findall(r"a=fmtp:102 (.*)\r\n", given.answer(own, served))
    expected = ["packetization-mode=1", f"profile-level-id={answer}"]
    assert sorted(parameters.split(";")) == (["level-asymmetry-allowed=1"] if asymmetric == "1" else []) + expected


def test_candidates_of_the_served_section_alone() -> None:
    given = Offer(offer(section(AUDIO, "0", user="audio"), section(VP8, "1"), session="a=group:BUNDLE 0 1\r\n"))
    served = given.serve(31)
    fragment = [
        "a=ice-ufrag:audio",  # the first of the offer, as MediaMTX's reader has it
        "m=audio 9 X 0",
        "a=mid:0",
        "a=candidate:1 1 udp 9 10.0.0.2 5000 typ host",
        "m=video 9 X 0",
        "a=mid:1",
        "a=candidate:2 1 udp 9 10.0.0.2 5001 typ host",
    ]
    assert given.candidates(fragment, served) == [fragment[-1]]
    with pytest.raises(ValueError, match="ICE restart"):
        given.candidates(["a=ice-ufrag:new", "a=ice-pwd:x"], served)


@pytest.mark.parametrize(
    ("text", "why"),
    [
        (offer(section(AUDIO, "0")), "no video"),
        (offer(section(VP8, "0"), section(VP8, "0")), "two sections"),
        (offer(section(VP8, "0"), session="a=group:BUNDLE 0 0\r\n"), "twice"),
        (offer("m=video\r\n"), "parsed"),
        (offer(section(VP8, "0", "inactive"), section(AUDIO, "1")), "must be recvonly"),
    ],
)
def test_offers_that_cannot_be_answered(text: str, why: str) -> None:
    with pytest.raises(InvalidOfferError, match=why):
        Offer(text).serve(31)


def test_our_own_offer_states_the_level() -> None:
    """RFC 6184, section 8.2.2: the parameters of a sendonly section are those of the stream."""
    lines = "a=fmtp:99 profile-level-id=42001f\r\na=fmtp:101 packetization-mode=1;profile-level-id=42e01f\r\n"
    assert with_level(lines, 21) == lines.replace("1f", "15")
