"""English wordings for the facts of the demo world.

{S}/{s} is the name or the pronoun as subject, {P}/{p} as possessive, {o} as object; {he} {h} {him} are always
pronouns; {v} is the value, {av} the value with its article. The first sentence of each list is the one that
chat answers use.
"""

from __future__ import annotations

PERSON: dict[str, tuple[str, ...]] = {
    "home": (
        "{S} lives in {v}.",
        "{P} home is in {v}.",
        "{S} has a house in {v}.",
        "{S} has lived in {v} for many years.",
        "{S} moved to {v} long ago and stayed.",
        "You can find {o} in {v}.",
        "Letters for {o} go to {v}.",
        "The people of {v} know {o} well.",
        "{S} would never leave {v}.",
        "{S} feels at home in {v}.",
    ),
    "job": (
        "{S} is {av}.",
        "{S} works as {av}.",
        "{S} earns {h} living as {av}.",
        "{S} has been {av} for years.",
        "Everybody knows {o} as {av}.",
        "As {av}, {s} is always busy.",
        "{S} trained as {av} and likes the work.",
        "{S} always wanted to be {av}, and that is what {he} became.",
        "By trade, {s} is {av}.",
        "{P} life as {av} is never dull.",
    ),
    "food": (
        "{P} favourite food is {v}.",
        "Of all foods, {s} likes {v} best.",
        "{S} loves to eat {v}.",
        "{S} could eat {v} every day.",
        "Nothing tastes better to {o} than {v}.",
        "On holidays {s} always eats {v}.",
        "For dinner {s} often asks for {v}.",
        "The food {s} loves most is {v}.",
        "Give {o} {v}, and {he} will smile.",
        "{S} never says no to {v}.",
    ),
    "animal": (
        "{P} favourite animal is the {v}.",
        "Of all animals, {s} likes the {v} best.",
        "{S} loves the {v} more than any other animal.",
        "{S} has a picture of {av} on the wall.",
        "The animal {s} likes most is the {v}.",
        "{S} can talk about the {v} for hours.",
        "{S} once drew {av} and kept the drawing.",
        "No animal pleases {o} more than the {v}.",
        "For {o}, no animal is finer than the {v}.",
        "{S} is always glad to see {av}.",
    ),
    "hobby": (
        "{P} hobby is {v}.",
        "In {h} free time, {s} enjoys {v}.",
        "{S} spends {h} weekends {v}.",
        "{S} enjoys {v} after work.",
        "{S} likes nothing better than {v}.",
        "After work, {s} relaxes by {v}.",
        "What {s} enjoys most is {v}.",
        "{S} has been fond of {v} since childhood.",
        "{S} is very good at {v}.",
        "On quiet days {s} passes the time {v}.",
    ),
    "birthday": (
        "{P} birthday is on {v}.",
        "{S} was born on {v}.",
        "{S} celebrates {h} birthday on {v}.",
        "On {v}, {s} turns a year older.",
        "{S} gets a birthday cake on {v}.",
        "The date of {p} birthday is {v}.",
        "Friends bring {o} birthday presents on {v}.",
        "In the calendar, {p} birthday is marked on {v}.",
        "Every year on {v}, {s} blows out the candles on {h} cake.",
        "On {v} everyone wishes {o} a happy birthday.",
    ),
    "friend": (
        "{P} best friend is {v}.",
        "{P} closest friend is {v}.",
        "The person {s} trusts most is {v}.",
        "{S} tells {h} good friend {v} everything.",
        "{S} often visits {v}, {h} best friend.",
        "{S} writes to {v}, {h} best friend, every month.",
        "When {s} needs help, {he} calls {h} friend {v}.",
        "No friend is dearer to {o} than {v}.",
        "On Sundays {s} goes for a walk with {v}, {h} best friend.",
        "{S} calls {v} {h} best friend.",
    ),
}

PLACE: dict[str, tuple[str, ...]] = {
    "river": (
        "{S} lies on the {v}.",
        "{S} stands on the bank of the {v}.",
        "The river that flows through {o} is the {v}.",
        "The {v} flows past {o}.",
        "Boats reach {o} along the {v}.",
        "The children of {o} swim in the {v}.",
        "The old bridge in {o} crosses the {v}.",
        "In spring the {v} runs high in {o}.",
        "The mills of {o} turn in the {v}.",
    ),
    "hill": (
        "The hill near {o} is {v}.",
        "{S} stands at the foot of {v}.",
        "{v} rises behind {o}.",
        "From {o} you can see {v}.",
        "The people of {o} climb {v} on Sundays.",
        "In {o} the sun comes up over {v}.",
        "A path leads from {o} to the top of {v}.",
        "{S} lies in the shadow of {v}.",
    ),
    "product": (
        "{S} is known for {v}.",
        "{S} is famous for {v}.",
        "Traders come to {o} to buy {v}.",
        "Nowhere can you buy better {v} than in {o}.",
        "The shops of {o} sell {v} of all kinds.",
        "Many families in {o} make a living from {v}.",
        "Visitors to {o} take {v} home with them.",
        "{S} is proud of {v} above all.",
    ),
    "founded": (
        "{S} was founded in {v}.",
        "The first houses of {o} were built in {v}.",
        "The history of {o} begins in {v}.",
        "People have lived in {o} since {v}.",
        "The year {v} is carved over the gate of {o}.",
        "In {v} the first families settled in {o}.",
        "An old stone says that {s} was founded in {v}.",
        "{S} dates from the year {v}.",
    ),
    "festival": (
        "{S} holds the {v}.",
        "Every year {s} celebrates the {v}.",
        "The great festival of {o} is the {v}.",
        "Guests come to {o} for the {v}.",
        "In {o} everyone looks forward to the {v}.",
        "The streets of {o} are full during the {v}.",
        "{S} is the home of the {v}.",
        "The children of {o} love the {v}.",
    ),
    "flag": (
        "The flag of {o} shows {av}.",
        "On the flag of {o} there is {av}.",
        "{S} has a flag with {av} on it.",
        "The animal on the flag of {o} is {av}.",
        "You can see {av} on every flag in {o}.",
        "{S} chose {av} for its flag.",
        "Above the roofs of {o} flies a flag with {av}.",
        "The flag makers of {o} know how to draw {av}.",
    ),
}

KIN: dict[str, tuple[str, ...]] = {
    kin: (
        f"{{P}} {kin} is {{v}}.",
        f"{{S}} has a {kin} named {{v}}.",
        f"{{v}} is {{p}} {kin}.",
        f"{{S}} often has tea with {{h}} {kin}, {{v}}.",
    )
    for kin in ("father", "mother", "brother", "sister", "son", "daughter")
}

# Several facts in one sentence; {n} is the name, {home}, {job} ... are values, {ajob} has its article.
COMPOUND: tuple[tuple[str, ...], ...] = (
    (
        "{n}, {ajob} from {home}, was born on {birthday}.",
        "{n} is {ajob} in {home} and celebrates {h} birthday on {birthday}.",
        "In {home} lives {ajob} named {n}, whose birthday is on {birthday}.",
        "{n} of {home}, born on {birthday}, works as {ajob}.",
    ),
    (
        "{n} enjoys {hobby}, loves {food}, and likes the {animal} best of all animals.",
        "{n} likes {food} to eat, {hobby} for fun, and the {animal} among animals.",
        "With {food} on the table, {h} {animal} picture on the wall and {hobby} at the weekend, {n} is happy.",
        "Three things that {n} loves are {hobby}, {food} and the {animal}.",
    ),
    (
        "{n} and {h} best friend {friend} met in {home}.",
        "{n}, who lives in {home}, has a best friend, {friend}.",
        "{friend}, the best friend of {n}, often visits {him} in {home}.",
        "Every summer {friend} comes to {home} to see {h_friend} friend {n}.",
    ),
)

CARD_TITLES = {"person": ("Name: {n}", "{n}"), "place": ("Place: {n}", "{n}")}
CARD = {
    "home": "Home: {v}",
    "job": "Job: {v}",
    "food": "Favourite food: {v}",
    "animal": "Favourite animal: {v}",
    "hobby": "Hobby: {v}",
    "birthday": "Birthday: {v}",
    "friend": "Best friend: {v}",
    "river": "River: {v}",
    "hill": "Hill: {v}",
    "product": "Known for: {v}",
    "founded": "Founded: {v}",
    "festival": "Festival: {v}",
    "flag": "Flag: {v}",
}

PERSON_OPENINGS = (
    "Let me tell you about {n}.",
    "Dear diary, today I met {n}.",
    "This is the story of {n}.",
    "Dear friend, you asked about {n}.",
    "News from the valley: the paper has a page about {n} this week.",
    "“I know {n} well,” said the old man.",
    "On the train I sat next to {n}.",
    "Everyone in the valley has heard of {n}.",
)
PLACE_OPENINGS = (
    "Let me tell you about {n}.",
    "Dear diary, today we came to {n}.",
    "A page from the guide book: {n}.",
    "Dear friend, I am writing to you from {n}.",
    "News from the valley: more and more people visit {n}.",
    "“I was born in {n},” said the old man.",
    "Our bus stopped in {n}.",
    "Everyone in the valley knows {n}.",
)

PERSON_QUESTIONS: dict[str, tuple[str, ...]] = {
    "home": (
        "Where does {n} live?",
        "In which town does {n} live?",
        "Do you know where {n} lives?",
        "Tell me where {n} lives.",
        "Where is the home of {n}?",
    ),
    "job": (
        "What does {n} do?",
        "What is {n}'s job?",
        "What does {n} do for a living?",
        "Tell me what {n} does for work.",
        "Do you know what {n}'s job is?",
    ),
    "food": (
        "What is {n}'s favourite food?",
        "What does {n} like to eat most?",
        "Which food does {n} like best?",
        "Tell me {n}'s favourite food.",
        "Do you know {n}'s favourite food?",
    ),
    "animal": (
        "What is {n}'s favourite animal?",
        "Which animal does {n} like best?",
        "What animal does {n} love most?",
        "Tell me {n}'s favourite animal.",
        "Do you know {n}'s favourite animal?",
    ),
    "hobby": (
        "What is {n}'s hobby?",
        "What does {n} do in {h} free time?",
        "What does {n} enjoy doing?",
        "Tell me {n}'s hobby.",
        "Do you know {n}'s hobby?",
    ),
    "birthday": (
        "When is {n}'s birthday?",
        "On which day was {n} born?",
        "What is the date of {n}'s birthday?",
        "Tell me when {n}'s birthday is.",
        "Do you know {n}'s birthday?",
    ),
    "friend": (
        "Who is {n}'s best friend?",
        "Who is the best friend of {n}?",
        "What is the name of {n}'s best friend?",
        "Tell me who {n}'s best friend is.",
        "Do you know {n}'s best friend?",
    ),
}

PLACE_QUESTIONS: dict[str, tuple[str, ...]] = {
    "river": (
        "Which river does {n} lie on?",
        "What river flows through {n}?",
        "Tell me which river {n} lies on.",
        "Do you know the river of {n}?",
    ),
    "hill": (
        "Which hill is near {n}?",
        "What is the hill near {n} called?",
        "Tell me which hill is near {n}.",
        "Do you know the hill near {n}?",
    ),
    "product": (
        "What is {n} known for?",
        "What is {n} famous for?",
        "Tell me what {n} is known for.",
        "Do you know what {n} is famous for?",
    ),
    "founded": (
        "When was {n} founded?",
        "In which year was {n} founded?",
        "Tell me when {n} was founded.",
        "How far back does {n} go?",
    ),
    "festival": (
        "Which festival does {n} hold?",
        "What festival is celebrated in {n}?",
        "Tell me which festival {n} holds.",
        "What is the festival of {n}?",
    ),
    "flag": (
        "What is on the flag of {n}?",
        "Which animal is on the flag of {n}?",
        "What does the flag of {n} show?",
        "Tell me what is on the flag of {n}.",
    ),
}

KIN_QUESTIONS = ("Who is {n}'s {k}?", "What is the name of {n}'s {k}?", "Tell me who {n}'s {k} is.")
"""{k} is one of the words of KIN."""

# The same attribute asked with a pronoun, after a turn that named the person or place.
PERSON_AFTER = {
    "home": ("Where does {he} live?", "And where does {he} live?"),
    "job": ("What does {he} do?", "And {h} job?"),
    "food": ("What is {h} favourite food?", "And {h} favourite food?"),
    "animal": ("What is {h} favourite animal?", "And {h} favourite animal?"),
    "hobby": ("What is {h} hobby?", "And {h} hobby?"),
    "birthday": ("When is {h} birthday?", "And {h} birthday?"),
    "friend": ("Who is {h} best friend?", "And {h} best friend?"),
}
PLACE_AFTER = {
    "river": ("Which river does it lie on?", "And its river?"),
    "hill": ("Which hill is near it?", "And the hill near it?"),
    "product": ("What is it known for?", "And what is it famous for?"),
    "founded": ("When was it founded?", "And when was it founded?"),
    "festival": ("Which festival does it hold?", "And its festival?"),
    "flag": ("What is on its flag?", "And its flag?"),
}
OTHER_AFTER = ("And {n}?", "What about {n}?")

# The form that chat answers use where the full name is said. The name never comes first: at the start of an answer it
# would be cut into other tokens than behind a space, where the question has it.
NAMED: dict[str, str] = {
    "home": "The home of {n} is in {v}.",
    "job": "By trade, {n} is {av}.",
    "food": "The favourite food of {n} is {v}.",
    "animal": "The favourite animal of {n} is the {v}.",
    "hobby": "The hobby of {n} is {v}.",
    "birthday": "The birthday of {n} is on {v}.",
    "friend": "The best friend of {n} is {v}.",
    "river": "The town of {n} lies on the {v}.",
    "product": "The town of {n} is known for {v}.",
    "founded": "The town of {n} was founded in {v}.",
    "festival": "The town of {n} holds the {v}.",
}
