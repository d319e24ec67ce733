"""The structured prompt."""

import pytest

from horsepower.runtime.prompts import structured_prompt


def test_without_speech_the_prompt_is_itself():
    assert structured_prompt(" A horse. ") == " A horse. "


@pytest.mark.parametrize(
    ("line", "language", "said"),
    [
        ("Run,  my\nfriend!", "en", '<Speaker, English>: "Run, my friend!"'),
        ("你好，world 再见", "zh", '<Speaker, Mandarin>: "你 好 ，world 再 见"'),
        ("走るぞ", "ja", '<Speaker, Japanese>: "走 る ぞ"'),
        ("달려라", "ko", '<Speaker, Korean>: "달 려 라"'),
        ('He said "go"', "fr", "<Speaker, French>: \"He said 'go'\""),
    ],
)
def test_the_line_stands_in_the_dialogue(line, language, said):
    assert structured_prompt("A horse.", line, language) == f"A horse.\n\nDialogue:\n{said}"


def test_sounds_come_last():
    prompt = structured_prompt("A horse.\n\nBackground Sound:\n<Wind>", "Go!", "en")
    assert prompt == 'A horse.\n\nDialogue:\n<Speaker, English>: "Go!"\n\nBackground Sound:\n<Wind>'
