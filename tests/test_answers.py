"""What is read as an answer, and which answers are equal, in training and in evaluation."""

import re
import threading
from decimal import Decimal
from fractions import Fraction

import numpy as np
import pytest
import torch

from luffy_trl.evaluation.scoring import judge_responses
from luffy_trl.rewards import ChoiceReward, MathReward, choice_letter, format_reward, verification, verify_math
from luffy_trl.rewards.answers import find_answer
from luffy_trl.rewards.checked import checked


def judge(rows: list[tuple[str, str, bool | None]]) -> list[tuple[str, str, bool | None]]:
    """The rows whose verdict is another than theirs."""
    verdicts = verify_math([answer for answer, _, _ in rows], [gold for _, gold, _ in rows])
    return [row for row, verdict in zip(rows, verdicts, strict=True) if verdict is not row[2]]


# Several boxes


@pytest.mark.parametrize(
    "text",
    [
        "\\(\\boxed{3}\\), \\(\\boxed{8}\\)",
        "\\[\\boxed{3}\\] and \\[\\boxed{8}\\]",
        "$\\boxed{3}\\qquad\\text{ or }\\qquad\\boxed{8}$",
        "\\boxed{3}\\;\\mathrm{\\ and\\ }\\;\\boxed{8}",
        "$y_1 = \\boxed{3}$, $y_{2} = \\boxed{8}$",
        "$\\alpha=\\boxed{3}$ and $\\beta=\\boxed{8}$",
        "f(1) = \\boxed{3}, f(2) = \\boxed{8}",
        "\\boxed{3}\n\\boxed{8}",
        "$$\\boxed{3}$$\n\n$$\\boxed{8}$$",
        "- $a=\\boxed{3}$\n- $b=\\boxed{8}$",
        "(i) \\boxed{3}\n(ii) \\boxed{8}",
        "Width: \\boxed{3}\nHeight: \\boxed{8}",
        "\\begin{align*}\na&=\\boxed{3}\\\\\nb&=\\boxed{8}\n\\end{align*}",
        "\\boxed{3} as well as \\fbox{8}",
        "one root is \\boxed{3} and the other root is \\boxed{8}",
        "<answer>3</answer>\n<answer>8</answer>",
    ],
)
def test_joined_boxes_are_one_answer_of_which_a_part_is_wrong(text):
    assert judge([(text, "3,8", True), (text, "8, 3", True), (text, "8", False), (text, "3", False)]) == []


@pytest.mark.parametrize(
    "text",
    [
        "\\boxed{3}, no wait, \\boxed{8}",
        "I get \\boxed{3}. A sign is missing, so it is \\boxed{8}.",
        "Not \\boxed{3} but \\boxed{8}",
        "\\boxed{3}? No, \\boxed{8}",
        "\\boxed{3}, or rather \\boxed{8}",
        "\\boxed{3}\n\nFinal answer: \\boxed{8}",
        "\\boxed{3}\nCorrection: \\boxed{8}",
        "<answer>3</answer> Let me check that again. <answer>8</answer>",
        "The answer is 3. Recounting gives \\boxed{8}.",
    ],
)
def test_a_later_box_corrects_an_earlier_one(text):
    assert judge([(text, "8", True), (text, "3", False), (text, "3,8", False)]) == []


def test_other_boxes():
    rows = [
        ("\\boxed{\\frac14} or \\boxed{0.25}", "\\frac14", True),  # the same twice is no list
        ("\\boxed{6}\n\n\\boxed{6}", "6", True),
        ("\\boxed{1} \\boxed{2} \\boxed{3}", "2", False),
        ("\\boxed{6}. It is in \\boxed{} now.", "6", True),
        ("\\boxed{4}, no, \\boxed{6", "4", False),
        ("\\boxed{\\boxed{6}}", "6", True),
        ("\\boxed6", "6", True),
        ("$\\boxed -12$.", "-12", True),
        ("\\boxed \\frac13", "1/3", True),
        ("\\fbox {6}", "6", True),
        ("\\boxed{6}, as the \\boxed command shows", "6", True),
    ]
    assert judge(rows) == []


# Spelling

SPELLINGS = {
    "6": "6. | 6, | =6 | **6** | __6__ | `6` | {\\bf 6} | \\textbf{6} | \\boldsymbol{6} | $6$ | \\$6 "
    "| \u20ac6 | 6\u200b | \ufeff6 | \uff16 | 6\u00a0 | \U0001d7d4 "
    "| 6\\text{ cm}^2 | 6~\\mathrm{m/s} | 6 pears | \\color{red}{6} | x = 6 | 6\\\\ ",
    "2500000": "2\\,500\\,000 | 2~500~000 | 2{,}500{,}000 | 2,500,000 | 2\\;500\\;000 "
    "| 2.5e6 | 2.5E+06 | 25e5 | 2.5\u00d710\u2076",
    "-0.0004": "-4e-4 | -4.0E-04 | \u22124\u00b710^{-4} | -0.00040",
    "\\frac{1}{6}": "0.1\\overline{6} | 0.1\\bar{6} | 0.1\\dot{6} | 0.1(6) | 0.1666... | 1\u20446 | \u2159 "
    "| .1\\overline{6}",
    "\\frac{1}{7}": "0.\\overline{142857} | 0.\\dot{1}4285\\dot{7} | 0.(142857)",
    "\\frac{7}{2}": "3\u00bd | 3\\frac12 | 3.5 | 7/2",
    "3\\sqrt{2}": "3\u221a2 | 3\u221a(2) | \u221a18 | 3 \u00b7 \u221a{2}",
    "x^3": "x\u00b3 | {\\bf x^3}",
    "\\frac{\\pi}{2}": "\u03c0/2 | \u00bd\u03c0",
    "(-\\infty, 4]": "(\u2212\u221e, 4]",
    "60": "60\u00b0 | 60^\\circ | 60\\degree | 60 degrees",
    "12, 345": "12,345 | \\{12, 345\\}",
}


@pytest.mark.parametrize("gold", SPELLINGS)
def test_spellings_of_one_answer(gold):
    spellings = [spelling.strip() for spelling in SPELLINGS[gold].split(" | ")]
    assert judge([(f"\\boxed{{{spelling}}}", gold, True) for spelling in spellings]) == []
    assert judge([(f"\\boxed{{{spelling}}}", "17", False) for spelling in spellings]) == []


def test_exact_expressions_are_compared_exactly_and_decimals_to_their_digits():
    rows = [
        ("2^{-200}", "2^{-201}", False),
        ("2^{-200}", "\\frac{1}{2^{200}}", True),
        ("1+10^{-25}", "1", False),
        ("\\sqrt2\\cdot10^{-20}", "\\sqrt3\\cdot10^{-20}", False),
        ("e^{-50}", "e^{-51}", False),
        ("10^{-30}x", "10^{-20}x", False),
        ("x = 10^{-30}", "10^{-20}", False),
        ("(3^{-60}, 1)", "(3^{-61}, 1)", False),
        ("10^{-20}", "0", False),
        ("\\sqrt{5+2\\sqrt6}", "\\sqrt2+\\sqrt3", True),
        ("0.0000001", "0.0000002", False),
        ("1.5\\times10^{-10}", "2.5\\times10^{-10}", False),
        ("1.3e-27", "1.325e-27", False),
        ("1.0000000001", "1", False),
        ("0.30000000000000004", "0.3", True),
        ("0.333333", "\\frac13", True),
        ("0.33", "\\frac13", False),
        ("3.141593", "\\pi", True),
        ("5.0", "5", True),
        ("9\\%", "9", True),
    ]
    assert judge([(f"\\boxed{{{answer}}}", gold, equal) for answer, gold, equal in rows]) == []


def test_the_base_of_a_number_counts():
    rows = [
        ("121_3", "121_3", True),
        ("121_3", "121_4", False),
        ("121_{3}", "121_{\\text{three}}", True),
        ("(121)_3", "121_4", False),
        ("121\u2083", "121_3", True),
        ("121\\text{ (base 3)}", "121_4", False),
        ("121", "121_3", True),
        ("12_3, 21_3", "12_4, 21_4", False),
        ("B7_{16}", "B7_{12}", False),
        ("x_1", "x_2", False),
    ]
    assert judge([(f"\\boxed{{{answer}}}", gold, equal) for answer, gold, equal in rows]) == []


# Announcements

ANNOUNCED = [
    "The answer is 18.",
    "So the final answer is: 18",
    "**Answer:** 18",
    "**Answer**: **18**",
    "ANSWER = 18",
    "### Final Answer\n\n18",
    "**Final Answer**\n\n$18$",
    "The answer is 18 eggs, because 9 + 9 = 18.",
    "The answer is $18.",
    "The answer to the problem is $n = 18$.",
    "The answer must be \\(18\\).",
    "The answer isn't 17, it's 18.",
    "The answer is not $17$ but $18$.",
    "The answer is 17. I forgot one: the answer is 18.",
    "9 + 9 = 18\n#### 18",
    "#### 18 eggs",
    "<answer>18</answer>",
    "<answer>\n$18$ eggs\n</answer>",
    "<answer>The answer is 18.</answer>",
    "\u7b54\u6848\uff1a18",
]
NOT_ANNOUNCED = [
    "The answer is not 18.",
    "The answer is 18. Wait, no, it is 17.",
    "The answer is 18. The answer is 17.",
    "Is the answer 18?",
    "The answer is 18? No.",
    "If the answer is 18, then nine are left.",
    "Maybe the answer is 18.",
    "The wrong answer is 18.",
    "The answer is 18 or 17.",
    "The answer is $18$ and $17$.",
    "The answer is 18 times 2.",
    "The answer is 18 more than 3.",
    "The answer is 18 minutes and 30 seconds.",
    "The answer is between 17 and 18.",
    "The answer is 18 if n is even",
    "#### Step 18",
    "#### 18. Compute the sum",
    "<answer>18</answer> On reflection, \\boxed{17}",
    "There are 18 answers.",
    "18",
]


def test_announced_answers_count_in_training_and_evaluation_alike():
    texts = ANNOUNCED + NOT_ANNOUNCED
    expected = [True] * len(ANNOUNCED) + [False] * len(NOT_ANNOUNCED)
    assert [
        text for text, right in zip(texts, verify_math(texts, ["18"] * len(texts)), strict=True) if right
    ] == ANNOUNCED
    judged = judge_responses("math", texts, ["18"] * len(texts), "unused")
    assert [judgement.correct for judgement in judged] == expected
    assert MathReward("unused")(texts, solution=["18"] * len(texts)) == [float(right) for right in expected]
    assert verify_math(["The answer is 18 or 17."], ["17, 18"]) == [True]


@pytest.mark.parametrize(
    "gold",
    [
        *["18 eggs", "$18$ eggs", "18.", "**18**", "\\(18\\)", "#### 18", "9 + 9 is 18\n#### 18", "Answer: 18"],
        *["The answer is 18.", "18.0", "\\$18", "<answer>18</answer>", "\\boxed{18}", "$18 \\text{ eggs}$", "x = 18"],
        *["18 km/h", "1.8e1", "\u200b18"],
    ],
)
def test_gold_answers_are_read_like_answers(gold):
    assert judge([("\\boxed{18}", gold, True), ("\\boxed{8}", gold, False)]) == []


@pytest.mark.parametrize(
    "gold",
    ["She sold 18 eggs.", "18 eggs and 6 pears", "about 18 or so", "The answer is unclear.", "\\boxed{18", "\u3000"],
)
def test_a_gold_answer_that_nothing_equals_gives_none(gold):
    assert verify_math(["\\boxed{18}", f"\\boxed{{{gold}}}", ""], [gold] * 3) == [None] * 3


def test_gold_numbers_keep_their_digits():
    golds = [
        2**70 + 1,
        7.0,
        1e-05,
        1e-30,
        Decimal("0.10"),
        Fraction(1, 3),
        np.int64(2**62 + 1),
        np.float32(0.1),
        "1/2",
        None,
    ]
    texts = [str(2**70 + 1), "7", "0.00001", "10^{-30}", "0.1", "\\frac13", str(2**62 + 1), "0.1", "0.5", "1"]
    completions = [f"</think>\\boxed{{{text}}}" for text in texts]
    assert MathReward()(completions, solution=golds) == [1.0] * 9 + [None]
    near = [str(2**70), "7.5", "0.00002", "10^{-29}", "0.11", "0.3", str(2**62), "0.2", "0.4", "1"]
    assert MathReward()([f"</think>\\boxed{{{text}}}" for text in near], solution=golds) == [0.0] * 9 + [None]


@pytest.mark.parametrize(
    ("gold", "said"),
    [
        (float("nan"), "is float nan, but must be text or a finite number, in row 1"),
        (2.0**70, "in row 1 of the batch: a float of this size may have lost digits"),
        (True, "is bool True, but must be text, in row 1"),
        (["1"], "is list ['1'], but must be text, in row 1"),
        ({"answer": 1}, "is dict {'answer': 1}, but must be text, in row 1"),
    ],
)
def test_other_gold_answers_are_refused_by_row(gold, said):
    with pytest.raises(ValueError, match=re.escape(said)):
        MathReward()(["1", "1"], solution=["1", gold])
    with pytest.raises(ValueError, match=r"choice_reward: `solution` is .* in row 1"):
        ChoiceReward()(["1", "1"], solution=["A", gold])


# Choices


@pytest.mark.parametrize(
    ("letter", "texts"),
    [
        (
            "C",
            ["**C**\n\nReason: it floats.", "C. Iron\n\nIt rusts.", "Option C", "(C)", "**Option C: Mars**", "#### C"],
        ),
        (
            "C",
            [
                "Answer: c",
                "The answer is (c).",
                "The answer is `C`.",
                "The answer is 'C'.",
                "The answer is \u201cC\u201d",
            ],
        ),
        (
            "C",
            [
                "Answer \u2014 C",
                "Answer -> C",
                "ANSWER=C",
                "Ans: C",
                "\u7b54\u6848\u662fC",
                "Correct answer: **C. Iron**",
            ],
        ),
        (
            "C",
            [
                "The answer should be C.",
                "We pick C.",
                "I would go with C",
                "C is correct.",
                "Hence, C is the best choice.",
            ],
        ),
        (
            "C",
            [
                "Thus option C is the right answer.",
                "The answer is C (iron).",
                "### Answer\nC",
                "**Final answer**\n\n(C) iron",
            ],
        ),
        (
            "C",
            [
                "\\boxed{\\bf C}",
                "\\fbox{C}",
                "\\boxed C",
                "\\boxed{Choice C}",
                "\\boxed{C: iron}",
                "<answer>\n(C)\n</answer>",
            ],
        ),
        (
            "C",
            [
                "The answer is C, D is wrong.",
                "The answer is C. Why not answer: D? It is light.",
                "Answer: C; D is wrong",
            ],
        ),
        (
            "C",
            [
                "The answer is C. Another option: B, sinks.",
                "The answer is not B. The answer is C.",
                "\\boxed{B} No: \\boxed{C}",
            ],
        ),
        ("A", ["The answer is A (iron)", "Answer: a", "A is the answer.", "The answer is A since it rusts"]),
        (
            None,
            ["Answer: C or D", "The answer is (c) or (d).", "Answer: C/D", "Answer: B, C", "Both C and D is correct"],
        ),
        (
            None,
            [
                "\\boxed{C, D}",
                "\\boxed{C} or \\boxed{D}",
                "\\boxed{C_6}",
                "\\boxed{\\mathrm{CO_2}}",
                "\\boxed{Carbon}",
            ],
        ),
        (
            None,
            [
                "The answer is a car.",
                "A dog barked.",
                "C or D",
                "The answer is not C.",
                "C is incorrect.",
                "Is the answer C?",
            ],
        ),
        (
            None,
            [
                "If the answer is C, it sinks.",
                "E. coli grows.",
                "Vitamin C is correct",
                "The answer is D-glucose",
                "a",
            ],
        ),
        (
            None,
            [
                "A) iron\nB) gold",
                "Neither C nor D is correct.",
                "<answer>C</answer> <answer>D</answer>",
                "#### Step C",
            ],
        ),
    ],
)
def test_choices(letter, texts):
    assert [text for text in texts if choice_letter(text) != letter] == []
    judged = judge_responses("choice", texts, ["C"] * len(texts), "unused")
    assert {judgement.correct for judgement in judged} == {letter == "C"}


# Format


@pytest.mark.parametrize(
    "tag", ["<think >", "< think>", "<THINK>", "</ think>", "</Think>", "<think/>", "<think", "</think", "<thinking>"]
)
def test_a_malformed_tag_is_no_format(tag):
    assert (
        format_reward([f"<think>a</think>b{tag}", f"<think>{tag}a</think>b", f"{tag}a</think>b", f"<think>a{tag}b"])
        == [0] * 4
    )


@pytest.mark.parametrize(
    "blank",
    ["\u200b", "\u00a0", "\u3000", "\ufeff", "\u2060", "\u200d \n", "\u2800", "\u3164", "\u00ad", "\ufe0f", "\0"],
)
def test_what_shows_nothing_is_blank(blank):
    assert format_reward([f"<think>{blank}</think>b", f"<think>a</think>{blank}", f"{blank}<think>a</think>b"]) == [
        0,
        0,
        blank not in "\u2800\u3164\ufe0f\0",
    ]


# Reward functions of others


def call(returned, log=None):
    def reward(completions, **kwargs):
        if log is not None:
            kwargs["log_extra"]("column", log)
        return returned

    return checked(reward, "mine")(completions=["a", "b"], log_extra=lambda column, values: None)


@pytest.mark.parametrize(
    ("returned", "said"),
    [
        (0.5, "'mine' returned 0.5 for 2 completions. Return a list"),
        (None, "'mine' returned None for 2 completions"),
        ("10", "'mine' returned '10' for 2 completions"),
        (torch.tensor(1.0), "'mine' returned tensor(1.) for 2 completions"),
        (np.float64(1), "for 2 completions"),
        ({0: 1.0, 1: 0.0}, "'mine' returned {0: 1.0, 1: 0.0} for 2 completions"),
        ([1.0], "'mine' returned 1 rewards, but 2 were expected"),
        ([1.0] * 3, "'mine' returned 3 rewards, but 2 were expected"),
        ([1.0, "1"], "'mine' returned '1' for row 1. Return a finite number"),
        ([[1.0], 1.0], "'mine' returned [1.0] for row 0"),
        ([1.0, 1e39], "'mine' returned 1e+39 for row 1"),
        ([1.0, -(10**400)], "for row 1"),
        ([1.0, 1j], "'mine' returned 1j for row 1"),
        (torch.tensor([1.0, float("inf")]), "'mine' returned tensor(inf) for row 1"),
        (torch.ones(2, 2), "for row 0"),
    ],
)
def test_what_is_no_reward_is_named(returned, said):
    with pytest.raises(ValueError, match=re.escape(said)):
        call(returned)


@pytest.mark.parametrize("values", [["x"], ["x"] * 3, "xy", 1, {"a": 1, "b": 2}])
def test_a_log_of_another_length_is_named(values):
    with pytest.raises(ValueError, match=r"'mine' gave log_extra .* for column 'column', but there are 2 completions"):
        call([0.0, 1.0], values)


def test_what_is_a_reward_stays():
    assert call([1, None]) == [1.0, None]
    assert call(iter([True, np.float32(0.5)])) == [1.0, 0.5]
    assert call(torch.tensor([1.0, 0.25]), ["x", "y"]) == [1.0, 0.25]
    assert call(np.array([1.0, 3e38]), np.array([1, 2])) == [1.0, 3e38]


# Untrusted texts


def test_one_hanging_answer_blocks_no_other_thread(monkeypatch):
    verifier = verification.Verifier()
    monkeypatch.setattr(verification, "_verifier", verifier)
    hanging = threading.Thread(
        target=verify_math, args=(["\\boxed{9^{9^{9^9}}}"], ["1"]), kwargs={"timeout": 600.0}, daemon=True
    )
    hanging.start()
    try:
        assert verify_math(["\\boxed{2}", "\\boxed{3}"], ["2", "2"]) == [True, False]
        assert hanging.is_alive()
    finally:
        while hanging.is_alive():  # a request whose worker dies is tried once more
            for worker in [worker for pool in verifier.pools.in_use for worker in pool.workers]:
                worker.process.kill()
            hanging.join(0.2)
        verifier.pools.close()


@pytest.mark.parametrize(
    "unit",
    ["\\boxed{", "$", "The answer is ", "1 000 ", "\\text{", "{", "<answer>", "#### 5\n", "0.\\dot{3}", "A or "],
)
def test_long_hostile_texts_are_read(unit):
    text = unit * (10_000 // len(unit))
    assert isinstance(find_answer(text), list)
    assert choice_letter(text) is None
