"""The vocabulary of progress: silence by default, everything in order when kept."""

from compress.tell import SILENT, Heard


def test_heard_keeps_what_was_told_in_order() -> None:
    tell = Heard()
    for listener in (SILENT, tell):
        listener.say("reading")
        listener.start("block", 2)
        listener.step(doing="searching")
        listener.step(1, "worst q_proj", found={"layers": []})
        listener.note("one layer was left")
    assert tell.events == [
        ("say", "reading"),
        ("start", "block", 2),
        ("step", None, "searching"),
        ("step", 1, "worst q_proj"),
        ("note", "one layer was left"),
    ]
    assert tell.notes == ["one layer was left"] and tell.said == ["reading"]
    assert tell.finished == [{"resumed": False, "layers": []}]
