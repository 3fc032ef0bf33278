"""The text picture of the trunk and its branches."""

from deploy.demo.picture import Branch, draw


def test_each_branch_is_drawn_from_its_branch_point_to_its_version() -> None:
    lines = draw([Branch(1, 48, 53), Branch(2, 95, 105), Branch(3, 143, 158)], 90)
    assert lines == [
        "trunk ━━━━━━━━━━━━━━━━━━━┳━━━━━━━━━━━━━━━━━┳━━━━━━━━━━━━━━━━━━┓",
        "                         ┗━╸               ┃                  ┃       v1, steps 48 to 53",
        "                                           ┗━━━╸              ┃       v2, steps 95 to 105",
        "                                                              ┗━━━━━╸ v3, steps 143 to 158",
    ]


def test_two_branches_can_share_a_branch_point() -> None:
    assert draw([Branch(1, 50, 60), Branch(2, 50, 100)], 60) == [
        "trunk ━━━━━━━━━━━━━━━━┓",
        "                      ┗━━━╸              v1, steps 50 to 60",
        "                      ┗━━━━━━━━━━━━━━━━╸ v2, steps 50 to 100",
    ]


def test_without_branches_nothing_is_drawn() -> None:
    assert draw([], 80) == []


def test_a_narrow_terminal_still_gets_a_picture() -> None:
    assert len(draw([Branch(1, 1_000_000, 1_000_001)], 10)) == 2
