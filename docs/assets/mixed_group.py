"""Draws mixed_group.svg: python docs/assets/mixed_group.py"""

from pathlib import Path


ROW, TOP = 27, 62
ON, OFF, TEXT = "#4477aa", "#cc6633", "#222222"
# reward and share of the widest bar, of seven rollouts and one demonstration
LENGTHS = (120, 150, 95, 135, 110, 145, 100, 190)
REWARDS = (0, 0, 0, 0, 0, 0, 0, 1)


def text(x, y, content, size=13, color=TEXT, anchor="start", weight="normal"):
    return (
        f'<text x="{x}" y="{y}" font-size="{size}" fill="{color}" text-anchor="{anchor}" '
        f'font-weight="{weight}">{content}</text>'
    )


def draw() -> str:
    mean = sum(REWARDS) / len(REWARDS)
    middle = TOP + ROW * len(REWARDS) / 2
    parts = [
        f'<rect x="14" y="{middle - 22:.0f}" width="86" height="40" rx="6" fill="none" stroke="{TEXT}"/>',
        text(57, middle + 3, "prompt", anchor="middle"),
        text(150, 36, "a group of 8 completions", weight="bold"),
        *(text(x, 36, t, anchor="middle", weight="bold") for x, t in ((410, "reward"), (490, "advantage"))),
        text(550, 36, "loss of each token", weight="bold"),
    ]
    for i, (length, reward) in enumerate(zip(LENGTHS, REWARDS, strict=True)):
        y = TOP + i * ROW
        color = OFF if i == len(REWARDS) - 1 else ON
        parts += [
            f'<path d="M100 {middle:.0f} C 125 {middle:.0f}, 125 {y + 9}, 148 {y + 9}" fill="none" stroke="#999999"/>',
            f'<rect x="150" y="{y}" width="{length}" height="18" rx="4" fill="{color}"/>',
            text(156, y + 13.5, "demonstration" if color == OFF else "rollout", 12, "#ffffff"),
            text(410, y + 14, str(reward), anchor="middle"),
            text(490, y + 14, f"{reward - mean:+.3f}", anchor="middle", color=color, weight="bold"),
        ]
    brace = TOP + 7 * ROW - 10
    last = TOP + 7 * ROW
    parts += [
        f'<path d="M542 {TOP} h5 V{brace} h-5" fill="none" stroke="{ON}"/>',
        text(556, TOP + 76, "TRL's own: ratio to the policy", color=ON),
        text(556, TOP + 94, "that sampled it, clipped", color=ON),
        text(550, last + 14, "-A r / (r + gamma), not clipped", color=OFF),
        text(410, last + 48, f"mean {mean}", anchor="middle"),
    ]
    height = last + 64
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 770 {height}" font-family="sans-serif">'
        f'<rect width="770" height="{height}" rx="10" fill="#ffffff"/>' + "".join(parts) + "</svg>\n"
    )


if __name__ == "__main__":
    Path(__file__).with_name("mixed_group.svg").write_text(draw())
