"""The trunk and its branches in text."""

from deploy.demo.picture import Branch, draw


def test_every_branch_leaves_the_trunk_where_it_did_and_ends_in_its_version() -> None:
    lines = draw([Branch(1, 48, 53), Branch(2, 95, 105), Branch(3, 143, 158)], 90)
    assert lines == [
        "trunk ━━━━━━━━━━━━━━━━━━━┳━━━━━━━━━━━━━━━━━┳━━━━━━━━━━━━━━━━━━┓",
        "                         ┗━╸               ┃                  ┃       v1, steps 48 to 53",
        "                                           ┗━━━╸              ┃       v2, steps 95 to 105",
        "                                                              ┗━━━━━╸ v3, steps 143 to 158",
    ]


def test_two_branches_of_one_point_share_it() -> None:
    assert draw([Branch(1, 50, 60), Branch(2, 50, 100)], 60) == [
        "trunk ━━━━━━━━━━━━━━━━┓",
        "                      ┗━━━╸              v1, steps 50 to 60",
        "                      ┗━━━━━━━━━━━━━━━━╸ v2, steps 50 to 100",
    ]


def test_nothing_trained_is_nothing_drawn() -> None:
    assert draw([], 80) == []


def test_a_narrow_terminal_still_gets_a_picture() -> None:
    assert len(draw([Branch(1, 1_000_000, 1_000_001)], 10)) == 2
