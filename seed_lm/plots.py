"""What the stories of the seed LM are made of: things, obstacles, acts and what they lead to.

In the texts {he}, {him}, {his} are the hero's pronouns, {thing} is what the hero wants, {helper}
who lends a hand, {friend} whom the thing is for.
"""

from dataclasses import dataclass

_HER = {"he": "she", "him": "her", "his": "her"}
_HIS = {"he": "he", "him": "him", "his": "his"}
HEROES = {
    name: _HER
    for name in ("Nora", "Mia", "Lucy", "Emma", "Ida", "Vera", "Anna", "Clara", "Rosa", "Ella")
} | {
    name: _HIS
    for name in ("Tom", "Ben", "Karl", "Oskar", "Paul", "Hugo", "Max", "Felix", "Leo", "Jonas")
}
THINGS = (
    *("kite", "ball", "lantern", "violin", "basket", "drum", "letter", "map", "book", "ring"),
    *("doll", "clock", "crown", "lamp", "flute", "coat", "hat", "pearl", "whistle", "mirror"),
)
HELPERS = (
    *("the baker", "the farmer", "the teacher", "the doctor", "the postman", "the gardener"),
    *("the fisherman", "the smith", "the painter", "{his} brother", "{his} sister", "{his} uncle"),
)
FRIENDS = ("{his} mother", "{his} father", "{his} aunt", "{his} cousin", "the king", "the queen")


@dataclass(frozen=True, slots=True)
class Act:
    """One way past an obstacle, and what is left of it when the story ends."""

    key: str
    text: str  # 'borrowed a ladder from {helper}'
    well: tuple[str, ...]  # '{he} ...' when it worked
    badly: tuple[str, ...]  # 'but ...' when it did not

    @property
    def helped(self) -> bool:
        """Whether somebody helps."""
        return "{helper}" in self.text


@dataclass(frozen=True, slots=True)
class Obstacle:
    """Where things are out of reach, and the ways to get at them."""

    key: str
    places: tuple[str, ...]
    texts: tuple[str, ...]  # 'But ...'
    acts: tuple[Act, ...]


@dataclass(frozen=True, slots=True)
class Motive:
    """Why the hero wants the thing, and how that ends."""

    key: str
    texts: tuple[str, ...]
    won: tuple[str, ...]  # '{he} ... and ...'
    lost: tuple[str, ...]


MOTIVES = (
    Motive(
        "gift",
        ("It was to be a present for {friend}.", "{He} wanted to give it to {friend}."),
        ("gave the {thing} to {friend}", "saw {friend} smile"),
        ("had no present for {friend}",),
    ),
    Motive(
        "promise",
        ("{He} had promised it to {friend}.", "{He} had told {friend} that {he} would bring it."),
        ("kept {his} promise to {friend}", "brought the {thing} to {friend}"),
        ("broke {his} promise to {friend}",),
    ),
    Motive(
        "feast",
        ("The feast in the village began at noon.", "Without it there could be no feast."),
        ("came to the feast in time", "showed the {thing} to all at the feast"),
        ("missed the feast",),
    ),
    Motive(
        "prize",
        ("{He} hoped to win a prize with it.", "A rich man had offered a prize for it."),
        ("won the prize", "bought a cow with the prize"),
        ("won no prize",),
    ),
    Motive(
        "dream",
        ("{He} had dreamed of it all winter.", "{He} had never wanted anything so much."),
        ("fell asleep with the {thing} in {his} arms", "played with the {thing} until dark"),
        ("went to bed in tears",),
    ),
    Motive(
        "loss",
        ("{He} had lost it there a week before.", "{Friend} had lost it there."),
        ("never lost the {thing} again", "hid the {thing} under {his} bed"),
        ("never saw the {thing} again",),
    ),
)

OBSTACLES = (
    Obstacle(
        "height",
        ("on the roof of the barn", "at the top of the old tree", "on the wall of the castle"),
        ("But it was too high for {him}.", "But {he} could not reach so high."),
        (
            Act(
                "ladder",
                "borrowed a ladder from {helper}",
                ("carried the ladder back to {helper}", "climbed down the ladder"),
                ("the ladder broke", "the ladder of {helper} was too short"),
            ),
            Act(
                "stick",
                "knocked it down with a long stick",
                ("caught the {thing} as it fell", "laid the stick down"),
                ("the stick was too short", "the stick made a hole in the {thing}"),
            ),
            Act(
                "climb",
                "climbed up on a rope",
                ("came down with sore hands", "slid down the rope"),
                ("the rope tore", "{he} fell and hurt {his} knee"),
            ),
            Act(
                "shoulders",
                "stood on the shoulders of {helper}",
                ("jumped down from {helper}", "thanked {helper}"),
                ("{helper} was not tall enough", "{helper} began to sneeze"),
            ),
            Act(
                "wind",
                "waited for the wind to blow it down",
                ("found the {thing} in the grass", "thanked the wind"),
                ("the wind carried it away", "no wind came for a week"),
            ),
        ),
    ),
    Obstacle(
        "water",
        ("on the island in the lake", "in the mill beyond the river", "on the far shore"),
        ("But there was no bridge over the water.", "But the water was deep and cold."),
        (
            Act(
                "boat",
                "rowed across in the boat of {helper}",
                ("tied the boat up again", "gave the boat back to {helper}"),
                ("the boat began to leak", "the boat of {helper} hit a stone"),
            ),
            Act(
                "swim",
                "swam across",
                ("dried {his} clothes by the fire", "came home all wet"),
                ("{he} caught a cold", "the cold water drove {him} back"),
            ),
            Act(
                "raft",
                "built a raft out of planks",
                ("left the raft on the shore", "made a table out of the planks"),
                ("the raft fell to pieces", "the planks sank under {his} feet"),
            ),
            Act(
                "ice",
                "waited until the water froze",
                ("walked home over the ice", "skated home"),
                ("the ice cracked", "the winter was too warm for ice"),
            ),
            Act(
                "duck",
                "sent the dog of {helper} across",
                ("gave the dog a bone", "brought the dog back to {helper}"),
                ("the dog ran off with it", "the dog of {helper} could not swim"),
            ),
        ),
    ),
    Obstacle(
        "lock",
        ("in the shed behind the school", "in the tower by the church", "in the iron chest"),
        ("But the lock was shut.", "But it was locked and nobody answered."),
        (
            Act(
                "key",
                "asked {helper} for the key",
                ("gave the key back to {helper}", "turned the key twice"),
                ("the key did not fit", "{helper} had lost the key"),
            ),
            Act(
                "hammer",
                "broke the lock with a hammer",
                ("paid for the broken lock", "put the hammer away"),
                ("the hammer hit {his} thumb", "the noise woke the guard"),
            ),
            Act(
                "wire",
                "opened the lock with a bent wire",
                ("bent the wire straight again", "shut the lock with the wire"),
                ("the wire broke in the lock", "{he} cut {his} finger on the wire"),
            ),
            Act(
                "saw",
                "cut a hole into the wood with the saw of {helper}",
                ("closed the hole with a board", "brought the saw back to {helper}"),
                ("the saw was blunt", "{helper} wanted the saw back too soon"),
            ),
            Act(
                "mouse",
                "sent a mouse through the gap",
                ("gave the mouse some cheese", "let the mouse go"),
                ("a cat ate the mouse", "the mouse did not come back"),
            ),
        ),
    ),
    Obstacle(
        "dog",
        ("in the yard behind the gate", "on the farm by the wood", "in the garden of the mayor"),
        ("But a big dog stood in the way.", "But an angry dog guarded it."),
        (
            Act(
                "bone",
                "threw the dog a bone",
                ("left the dog with its bone", "passed the happy dog"),
                ("the dog did not like the bone", "three more dogs came for the bone"),
            ),
            Act(
                "song",
                "sang the dog to sleep",
                ("walked past the sleeping dog", "sang all the way home"),
                ("the dog began to howl too", "{his} song woke the whole village"),
            ),
            Act(
                "hold",
                "asked {helper} to hold the dog",
                ("shook hands with {helper}", "thanked {helper}"),
                ("the dog bit {helper}", "{helper} was afraid of dogs"),
            ),
            Act(
                "run",
                "ran past the dog",
                ("sat down out of breath", "shut the gate just in time"),
                ("the dog was faster", "the dog tore {his} trousers"),
            ),
            Act(
                "cat",
                "let the cat of {helper} out",
                ("brought the cat back to {helper}", "gave the cat some milk"),
                ("the dog was a friend of the cat", "the cat of {helper} fell asleep"),
            ),
        ),
    ),
    Obstacle(
        "dark",
        ("in the cellar of the inn", "in the cave by the sea", "deep in the old mine"),
        ("But it was as dark there as night.", "But {he} was afraid of the dark."),
        (
            Act(
                "candle",
                "lit a candle",
                ("blew the candle out", "wiped the wax from {his} hands"),
                ("the candle went out", "the candle burned {his} hair"),
            ),
            Act(
                "torch",
                "took the torch of {helper} along",
                ("gave the torch back to {helper}", "put the torch out in the sand"),
                ("the torch smoked too much", "the torch of {helper} was wet"),
            ),
            Act(
                "feel",
                "felt the way along the wall",
                ("washed the dirt from {his} hands", "blinked in the bright sun"),
                ("{he} lost the way", "{he} touched a spider and ran"),
            ),
            Act(
                "company",
                "asked {helper} to come along",
                ("shared a cake with {helper}", "thanked {helper}"),
                ("{helper} was afraid too", "{helper} heard a ghost and ran"),
            ),
            Act(
                "morning",
                "opened the door wide to let the sun in",
                ("shut the door again", "thanked the sun"),
                ("a cloud hid the sun", "the sun had gone down"),
            ),
        ),
    ),
    Obstacle(
        "price",
        ("in the window of the shop", "at the market by the harbour", "at the fair"),
        ("But it cost ten coins.", "But {he} had only two coins."),
        (
            Act(
                "work",
                "worked for {helper} for a week",
                ("thanked {helper} for the work", "spent all {his} wages"),
                ("{helper} did not pay", "{he} was too tired to go back"),
            ),
            Act(
                "sell",
                "sold {his} watch",
                ("never knew the time again", "did not miss {his} watch"),
                ("the watch was worth nothing", "the watch did not tick"),
            ),
            Act(
                "loan",
                "borrowed the coins from {helper}",
                ("paid the coins back to {helper}", "owed {helper} eight coins"),
                ("{he} lost the coins on the way", "{helper} had no coins left"),
            ),
            Act(
                "haggle",
                "talked about the price for an hour",
                ("paid half the price", "shook hands with the merchant"),
                ("the merchant grew angry", "the merchant would not listen"),
            ),
            Act(
                "song",
                "sang in the street for money",
                ("bowed to the crowd", "counted the money twice"),
                ("nobody liked {his} song", "the rain drove the crowd away"),
            ),
        ),
    ),
)
