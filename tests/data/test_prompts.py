"""Prompt files and the order in which iterations visit them."""

import json
import os

import pytest

from advgrpo.data.prompts import GroupSampler, Prompt, load_prompts
from advgrpo.errors import UserError


def write(tmp_path, text, name="prompts.txt"):
    path = tmp_path / name
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    return path


def test_text_file_one_prompt_per_line(tmp_path):
    path = write(tmp_path, '\ufeffa red star\r\n  a blue circle \na sign \u2028 "OPEN"\n\n')
    assert [p.text for p in load_prompts(path)] == ["a red star", "a blue circle", 'a sign \u2028 "OPEN"']


def test_jsonl_keeps_metadata(tmp_path):
    lines = [{"prompt": "a red star", "objects": ["star"], "count": 2}, {"prompt": "ein grüner Kreis"}]
    path = write(tmp_path, "\n".join(json.dumps(line, ensure_ascii=False) for line in lines), "prompts.jsonl")
    assert load_prompts(path) == [Prompt("a red star", {"objects": ["star"], "count": 2}), Prompt("ein grüner Kreis")]


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("p.txt", "", "empty"),
        ("p.txt", " \n\n", "empty"),
        ("p.txt", "a\n\nb\n", "line 2: the prompt is blank"),
        ("p.txt", "a\nb\n a\n", "line 3: prompt 'a' repeats line 1"),
        ("p.txt", b"a\xff\n", "not UTF-8"),
        ("p.csv", "a\n", r"suffix '\.csv' is unknown"),
        ("p.jsonl", '{"prompt": "a"}\n{"prompt": "b"\n', "line 2: not JSON"),
        ("p.jsonl", '{"prompt": "a"}\n\n{"prompt": "b"}', "line 2: the prompt is blank"),
        ("p.jsonl", '{"prompt": "  "}', "line 1: the prompt is blank"),
        ("p.jsonl", '{"text": "a"}', 'line 1: expected an object with a string "prompt"'),
        ("p.jsonl", '["a"]', 'line 1: expected an object with a string "prompt"'),
        ("p.jsonl", '{"prompt": 3}', 'line 1: expected an object with a string "prompt"'),
        ("p.jsonl", '{"prompt": "a", "x": ' + "[" * 100_000, "line 1: JSON nested too deeply"),
        ("p.jsonl", '{"prompt": "a", "x": ' + "9" * 5000 + "}", "line 1: a number has thousands of digits"),
        ("p.jsonl", '{"prompt": "a \\ud83d star"}', "line 1: holds half a character"),
        ("p.jsonl", '{"prompt": "a", "deep": [{"\\udfff": 1}]}', "line 1: holds half a character"),
    ],
)
def test_bad_files_are_named(tmp_path, name, text, message):
    path = write(tmp_path, text, name)
    with pytest.raises(UserError, match=message) as error:
        load_prompts(path)
    assert str(path) in str(error.value)


def test_pipes_and_devices_are_not_waited_for(tmp_path):
    os.mkfifo(tmp_path / "pipe.txt")
    (tmp_path / "zeros.txt").symlink_to("/dev/zero")
    for name in ("pipe.txt", "zeros.txt"):
        with pytest.raises(UserError, match=rf"{name} cannot be read: it is a pipe or a device"):
            load_prompts(tmp_path / name)
    with pytest.raises(UserError, match="cannot be read"):
        load_prompts("p\0.txt")


def test_a_file_too_large_for_prompts_is_not_swallowed(tmp_path):
    with open(tmp_path / "disk.txt", "wb") as file:
        file.truncate(2**40)  # a hole: no bytes on the disk
    with pytest.raises(UserError, match="larger than 1,073,741,824 bytes"):
        load_prompts(tmp_path / "disk.txt")


def test_whole_characters_above_the_basic_plane_are_fine(tmp_path):
    assert load_prompts(write(tmp_path, '{"prompt": "\\ud83d\\ude00 star"}', "p.jsonl"))[0].text == "\U0001f600 star"


def test_missing_file_and_folder(tmp_path):
    with pytest.raises(UserError, match="does not exist"):
        load_prompts(tmp_path / "none.txt")
    (tmp_path / "folder.txt").mkdir()
    with pytest.raises(UserError, match="cannot be read"):
        load_prompts(tmp_path / "folder.txt")


@pytest.mark.parametrize(("num_prompts", "per_iteration"), [(10, 3), (10, 10), (3, 10), (1, 4), (7, 1)])
def test_every_epoch_visits_every_prompt_once(num_prompts, per_iteration):
    sampler = GroupSampler(num_prompts, per_iteration, seed=5)
    iterations = num_prompts * 4
    drawn = [index for i in range(iterations) for index in sampler.next(i)]
    epochs = [drawn[k : k + num_prompts] for k in range(0, len(drawn), num_prompts)]
    assert len(drawn) == iterations * per_iteration
    assert all(sorted(epoch) == list(range(num_prompts)) for epoch in epochs)


def test_order_depends_on_seed_and_epoch():
    first, again, other = (GroupSampler(50, 50, seed) for seed in (1, 1, 2))
    assert first.next(0) == again.next(0) != other.next(0)
    assert first.next(0) != first.next(1)


def test_a_resumed_sampler_continues_the_sequence():
    running = GroupSampler(10, 4, seed=3)
    expected = [running.next(i) for i in range(9)]
    assert [GroupSampler(10, 4, seed=3).next(i) for i in reversed(range(9))] == expected[::-1]


def test_sampler_rejects_bad_arguments():
    with pytest.raises(UserError, match="num_prompts=0"):
        GroupSampler(0, 1, 0)
    with pytest.raises(UserError, match="prompts_per_iteration=0"):
        GroupSampler(1, 0, 0)
    with pytest.raises(ValueError, match="iteration=-1"):
        GroupSampler(1, 1, 0).next(-1)
