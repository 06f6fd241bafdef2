"""A peer is prepared once, called often, and read when its result is wanted."""

from dscoder.testing.peer import Peer, Run


def test_what_is_prepared_and_what_is_read_stay_out_of_the_call() -> None:
    seen: list[str] = []

    def prepare(values: list[int], *, factor: int) -> Run:
        seen.append("prepare")
        doubled = [factor * value for value in values]

        def call() -> list[int]:
            seen.append("call")
            return doubled[::-1]

        return Run(call=call, read=lambda raw: raw[::-1])

    run = Peer(prepare=prepare).prepare([1, 2], factor=2)
    assert seen == ["prepare"]
    assert run.call() == [4, 2]
    assert run() == [2, 4]
    assert seen == ["prepare", "call", "call"]


def test_a_called_peer_gives_what_it_reads() -> None:
    assert Peer(prepare=lambda x: Run(call=lambda: (x, "maps"), read=lambda raw: raw[0]))(3) == 3


def test_a_result_that_is_ours_already_is_read_as_it_is() -> None:
    assert Run(call=lambda: "rows")() == "rows"
