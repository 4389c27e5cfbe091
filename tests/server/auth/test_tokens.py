"""Tokens: what a process accepts of the tokens that it has issued."""

from server.auth.tokens import Grant, Tokens


def test_tokens_expire() -> None:
    tokens = Tokens()
    token = tokens.issue(Grant("stream_a", "view", 100.0, 3))
    assert tokens.read(token, 99.0) == Grant("stream_a", "view", 100.0, 3)
    assert tokens.read(token, 100.0) is None
    assert Tokens().read(token, 99.0) is None, "another process has another secret"
