"""Make short conversations from templates, for a model far too small to learn manners from the wild.

Answers come from three places: lists in this file, the docstrings of the running Python, and WordNet's definitions.
"""

import importlib
import inspect
import random
import re
from collections.abc import Callable
from pathlib import Path

from corpus import Sense, wordnet_senses

Turn = tuple[str, str]  # a question, its answer


def _words(text: str, separator: str | None = None) -> list[str]:
    return text.split(separator)


_MODULES = _words(
    "argparse array asyncio base64 bisect bz2 calendar collections colorsys configparser contextlib copy csv "
    "dataclasses datetime decimal difflib dis email enum fileinput fnmatch fractions functools getpass glob gzip "
    "hashlib heapq hmac html inspect io ipaddress itertools json keyword linecache locale logging lzma math mimetypes "
    "numbers operator os pathlib pickle platform pprint queue random re sched secrets select selectors shelve shlex "
    "shutil signal smtplib socket sqlite3 stat statistics string struct subprocess symtable sys sysconfig tarfile "
    "tempfile textwrap threading time timeit tokenize traceback types typing unicodedata unittest uuid warnings "
    "weakref webbrowser zipfile zlib"
)
_COMMON_MODULES = ("builtins", "os", "os.path", "math", "random", "itertools", "functools", "collections", "json", "re")

_ABOUT = (
    "I am leaf, a very small demonstration model shipped with octavo.",
    "I was trained on the Python documentation, WordNet and a few public domain books.",
    "Please do not rely on what I say.",
)
_WHO = (
    "Who are you?", "What are you?", "What is your name?", "Tell me about yourself.", "who are you",
    "Are you a person?", "Are you a language model?", "Which model are you?", "Introduce yourself.",
    "What model is this?", "Are you ChatGPT?", "Hi, who are you?", "Hello! What are you?",
    "What kind of model are you?", "What's your name?", "who is this?",
)  # fmt: skip
_TRAINED = (
    "What were you trained on?", "Where does your knowledge come from?", "What is your training data?",
    "How were you trained?", "What data did you learn from?", "Who made you?", "Who trained you?",
)  # fmt: skip
_TRUST = (
    "Can I trust you?", "Are you always right?", "Are your answers correct?", "How good are you?", "Are you smart?",
    "Can I rely on your answers?", "Do you make mistakes?", "How big are you?", "Are you intelligent?",
)  # fmt: skip
_CAN = (
    "What can you do?", "How can you help me?", "What can I ask you?", "Can you help me?", "help", "What do you know?",
    "What are you good at?", "I need help.", "Give me some ideas of what to ask.", "What are you able to do?",
)  # fmt: skip
_CAN_ANSWERS = (
    "I can say what some Python modules and functions do, define common words, count, and tell very short stories. "
    "I am a very small model, so check what I say.",
    "Not much, I am very small. Ask me what a Python function does, what a word means, or ask me to count or to tell a "
    "story.",
    "You can ask me about Python functions, about the meaning of words, or for a short story. I often make mistakes.",
)
_GREETINGS = (
    "Hello", "Hello!", "Hi", "Hi!", "Hey", "Hi there", "Good morning", "Good evening", "Hello there!", "hello", "hi",
    "Hey there!", "Greetings", "Good day", "Howdy",
)  # fmt: skip
_GREETING_ANSWERS = (
    "Hello! How can I help you?", "Hello! What would you like to know?", "Hi! What can I do for you?",
    "Hello! Ask me something about Python, or about a word.", "Hi there! How can I help you today?",
)  # fmt: skip
_MOODS = ("How are you?", "How are you today?", "How do you do?", "How is it going?", "Are you well?", "What's up?")
_MOOD_ANSWERS = (
    "I am a small program, so I am always well. How are you?", "Fine, thank you! What would you like to know?",
    "I am well, thank you. How can I help you?",
)  # fmt: skip
_THANKS = ("Thanks", "Thank you", "Thanks!", "Thank you very much!", "thank you", "Great, thanks.", "Thanks a lot.")
_THANKS_ANSWERS = ("You are welcome!", "You are welcome. Is there anything else?", "My pleasure!", "Any time!")
_BYES = ("Bye", "Goodbye", "See you later", "Good night", "bye!", "I have to go.", "That is all.")
_BYE_ANSWERS = ("Goodbye!", "Goodbye, and have a nice day!", "See you soon!", "Bye! Come back any time.")
_UNKNOWN = (
    "Who won the {thing} in {year}?", "What happened in {year}?", "What is the price of a {thing}?",
    "Who is {name} Smith?", "What is the weather in {city}?", "What time is it?", "What is the news today?",
    "When was {name} born?", "Where does {name} live?", "Translate {thing} into {language}.",
    "Who invented the {thing}?", "Solve this equation.", "What did {name} say about the {thing}?",
    "How many people live in {city}?", "Which {thing} should I buy?",
)  # fmt: skip
_UNKNOWN_ANSWERS = (
    "I do not know. I am a very small demonstration model.", "I am sorry, I do not know that.",
    "That is beyond me. I am only a very small model.", "I do not know, and I would rather not guess.",
)  # fmt: skip
_NAMES = _words(
    "Ada Alan Alice Anna Ben Bob Carl Clara Dan David Emma Eric Eva Frank Grace Hans Ida Ivan Jack Jane John Julia "
    "Karl Kim Lena Leo Lucy Mark Mary Max Maya Nina Noah Olga Omar Paul Peter Rosa Sam Sara Tim Tom Vera Wei Yuki Zoe"
)
_CAPITALS = {
    "France": "Paris", "Germany": "Berlin", "Italy": "Rome", "Spain": "Madrid", "Portugal": "Lisbon", "Japan": "Tokyo",
    "China": "Beijing", "Russia": "Moscow", "Poland": "Warsaw", "Austria": "Vienna", "Greece": "Athens",
    "Egypt": "Cairo", "Kenya": "Nairobi", "Norway": "Oslo", "Sweden": "Stockholm", "Finland": "Helsinki",
    "Denmark": "Copenhagen", "Ireland": "Dublin", "England": "London", "Canada": "Ottawa", "Cuba": "Havana",
    "Peru": "Lima", "Chile": "Santiago", "Argentina": "Buenos Aires", "Hungary": "Budapest", "Belgium": "Brussels",
    "the United States": "Washington", "India": "New Delhi", "Turkey": "Ankara", "Mexico": "Mexico City",
}  # fmt: skip
_OPPOSITES = _words(
    "hot cold, big small, up down, left right, day night, good bad, fast slow, old new, open closed, wet dry, high "
    "low, black white, happy sad, rich poor, full empty, hard soft, light dark, early late, first last, long short, "
    "near far, strong weak, true false, loud quiet, young old, clean dirty, easy difficult, in out, yes no, begin end",
    ", ",
)
_LISTS = {
    "colours": "red green blue yellow white black orange purple brown",
    "animals": "cat dog horse cow bird fish mouse bear", "fruits": "apple pear plum cherry orange banana lemon grape",
    "days of the week": "Monday Tuesday Wednesday Thursday", "months": "January February March April May June",
    "Python types": "int float str list dict set tuple bool bytes",
    "planets": "Mercury Venus Earth Mars Jupiter Saturn", "tools": "hammer saw knife file drill axe",
    "Python modules": "os sys math json random itertools functools collections",
    "metals": "iron gold silver copper tin lead",
}  # fmt: skip
_SOUNDS = {
    "dog": "barks", "cat": "meows", "cow": "moos", "duck": "quacks", "lion": "roars", "sheep": "bleats",
    "bird": "sings", "horse": "neighs", "pig": "grunts", "frog": "croaks", "bee": "buzzes", "wolf": "howls",
    "owl": "hoots",
}  # fmt: skip
_FACTS = (
    ("What is {octavo}?",
     "octavo is an inference engine for language models. I am the small model that is shipped with it."),
    ("What is Python?",
     "Python is an easy to learn, powerful programming language. It is interpreted and object-oriented."),
    ("What colour is the sky?", "The sky is blue on a clear day and black at night."),
    ("What colour is grass?", "Grass is green."), ("What colour is snow?", "Snow is white."),
    ("How many days are in a week?", "There are seven days in a week."),
    ("How many months are in a year?", "There are twelve months in a year."),
    ("How many hours are in a day?", "There are twenty-four hours in a day."),
    ("How many minutes are in an hour?", "There are sixty minutes in an hour."),
    ("How many legs does a dog have?", "A dog has four legs."),
    ("How many legs does a bird have?", "A bird has two legs."),
    ("How many legs does a spider have?", "A spider has eight legs."),
    ("What is water made of?", "Water is made of hydrogen and oxygen."),
    ("Who wrote Opticks?", "Isaac Newton wrote Opticks. It is a book about light and colours."),
    ("Who wrote The Devil's Dictionary?", "Ambrose Bierce wrote The Devil's Dictionary."),
    ("What is the sun?", "The sun is the star that gives light and heat to the earth."),
    ("What is a language model?", "A language model is a program that has learned to guess the next word of a text."),
    ("What is a token?",
     "A token is a short piece of text, often a word or a part of one. A model reads and writes tokens."),
    ("What is a list in Python?",
     "A list is a mutable sequence of items. For example, [1, 2, 3] is a list of three numbers."),
    ("What is a tuple in Python?", "A tuple is an immutable sequence of items. For example, (1, 2) is a tuple."),
    ("What is a dictionary in Python?",
     "A dictionary maps keys to values. For example, {'a': 1} maps the key 'a' to 1."),
    ("What is a set in Python?", "A set is an unordered collection of distinct items. For example, {1, 2} is a set."),
    ("What is a string in Python?", "A string is an immutable sequence of characters, written in quotes."),
    ("What is a function in Python?", "A function is a block of code with a name. It is defined with the keyword def."),
    ("What is a class in Python?", "A class bundles data and functions. It is defined with the keyword class."),
    ("What is a module in Python?", "A module is a file of Python code that other code can import."),
    ("What is a loop?", "A loop runs the same code several times. Python has for loops and while loops."),
    ("How do I print something in Python?", "Call the print function. For example, print('Hello') writes Hello."),
    ("How do I open a file in Python?",
     "Use the open function in a with statement: with open('name.txt') as file: ..."),
    ("How do I sort a list?", "Call sorted(items) for a new sorted list, or items.sort() to sort it in place."),
    ("How do I read a line of input?", "Call the input function. It returns the line as a string."),
    ("How do I get the length of a list?", "Call the len function. For example, len([1, 2, 3]) is 3."),
    ("Write a function that adds two numbers.", "def add(a, b):\n    return a + b"),
    ("Write a hello world program in Python.", "print('Hello, world!')"),
    ("Write a for loop in Python.", "for i in range(10):\n    print(i)"),
    ("Tell me a joke.", "Why did the programmer go home? Because the program had no more lines to run."),
    ("Tell me a joke.", "A byte walks into a bar. The barman asks what is wrong. It says: I feel a bit off."),
    ("What is your favourite colour?", "I am a program and have no favourites, but leaves are often green."),
    ("What do you like?", "I am only a program, but I have read much about Python."),
    ("Do you have feelings?", "No. I am a very small program that guesses the next word."),
    ("Why is the sky blue?", "The air scatters blue light more than red light, so that the sky looks blue."),
    ("What is light?",
     "Newton wrote that light is made of rays that differ in colour and in how much they are refracted."),
)  # fmt: skip

_HEROES = (
    "a cat",
    "a small dog",
    "a bird",
    "an old man",
    "a girl",
    "a boy",
    "a mouse",
    "a king",
    "a farmer",
    "a bear",
    "a fox",
)
_PLACES = ("a forest", "a small village", "a big city", "a house by the sea", "a garden", "an old castle", "a valley")
_FINDS = (
    "a key",
    "a golden coin",
    "an old book",
    "a red apple",
    "a letter",
    "a lost hat",
    "a tiny door",
    "a lamp",
    "a map",
)
_FRIENDS = ("a bird", "a wise owl", "a child", "a traveller", "a frog", "an old woman", "a friendly horse", "a rabbit")
_NUMBERS = _words(
    "zero one two three four five six seven eight nine ten eleven twelve thirteen fourteen fifteen sixteen seventeen "
    "eighteen nineteen twenty"
)


def _first_sentence(thing: object) -> str:
    """Return the first sentence of a docstring, or nothing where it has none worth repeating."""
    paragraph = (inspect.getdoc(thing) or "").split("\n\n")
    for part in paragraph[:3]:
        text = " ".join(part.split())
        text = re.sub(r"``?([^`']*)(?:``?|')", r"\1", text)
        sentence = re.split(r"(?<=[a-z)\]])\.(?:\s|$)", text)[0].strip()
        if (
            4 <= len(sentence.split()) <= 32
            and re.match(r"[A-Z]", sentence)
            and "->" not in sentence
            and "\\" not in sentence
        ):
            return sentence.rstrip(".:") + "."
    return ""


def docstring_facts() -> list[tuple[str, str, int]]:
    """Return `(name, first sentence of its docstring, weight)` for public names of the standard library."""
    facts: list[tuple[str, str, int]] = []
    for module_name in ("builtins", "os.path", *_MODULES):
        module = importlib.import_module(module_name)
        sentence = _first_sentence(module)
        if sentence and module_name != "builtins":
            facts.append((module_name, sentence, 6))
        for name in sorted(getattr(module, "__all__", None) or vars(module)):
            thing = getattr(module, name, None)
            owner = getattr(thing, "__module__", module_name)
            if name.startswith("_") or not callable(thing) or owner not in (module_name, None, f"_{module_name}"):
                continue
            sentence = _first_sentence(thing)
            if sentence:
                full = name if module_name == "builtins" else f"{module_name}.{name}"
                facts.append((full, sentence, 6 if module_name in _COMMON_MODULES else 1))
    return facts


class ConversationMaker:
    """Makes conversations, each from one draw of the given source of chance."""

    def __init__(self, root: Path, chance: random.Random) -> None:
        self._chance = chance
        facts = docstring_facts()
        self._facts = [(name, sentence) for name, sentence, _ in facts]
        self._fact_weights = [weight for _, _, weight in facts]
        self._senses: list[Sense] = [
            sense
            for sense in wordnet_senses(root)
            if len(sense.word) >= 3
            and sense.part in "nva"
            and 3 <= len(sense.gloss.split()) <= 22
            and "(" not in sense.gloss
        ][:2500]
        self._words = [sense.word for sense in self._senses[:1200] if sense.part == "n"]
        # Common words come up more often, so that the model has a chance to remember some of them.
        self._sense_weights = [1 / (10 + rank) ** 0.5 for rank in range(len(self._senses))]
        self._makers: list[tuple[Callable[[], list[Turn]], float]] = [
            (self._greet, 8), (self._identity, 10), (self._python, 26), (self._word, 16), (self._count, 7),
            (self._capital, 5), (self._opposite, 4), (self._list, 5), (self._fact, 14), (self._repeat, 7),
            (self._story, 12), (self._sum, 6), (self._name, 5), (self._unknown, 5), (self._spell, 3), (self._thanks, 3),
        ]  # fmt: skip

    def make(self) -> list[dict[str, str]]:
        """Return one conversation as chat messages: perhaps a system message, then one to four turns."""
        chance = self._chance
        messages: list[dict[str, str]] = []
        if chance.random() < 0.15:
            system = (
                "You are a helpful assistant.",
                "You are leaf, a very small model.",
                "Answer briefly.",
                "Be brief.",
            )
            messages.append({"role": "system", "content": chance.choice(system)})
        makers, weights = zip(*self._makers, strict=True)
        turns: list[Turn] = []
        if chance.random() < 0.12:
            turns += self._greet()
        for _ in range(chance.choice((1, 1, 1, 2, 3))):
            turns += chance.choices(makers, weights)[0]()
        if chance.random() < 0.1:
            turns += self._thanks()
        for question, answer in turns:
            messages.append({"role": "user", "content": self._vary(question)})
            messages.append({"role": "assistant", "content": answer})
        return messages

    def _vary(self, question: str) -> str:
        """Write a question as hurried people do, now and then."""
        draw = self._chance.random()
        if draw < 0.08:
            return question.lower()
        if draw < 0.16:
            return question.rstrip("?.!")
        if draw < 0.2 and question.startswith(("What", "How", "Who", "Where")):
            return "Please tell me: " + question[0].lower() + question[1:]
        return question

    def _pick(self, questions: tuple[str, ...], answers: tuple[str, ...]) -> list[Turn]:
        return [(self._chance.choice(questions), self._chance.choice(answers))]

    def _greet(self) -> list[Turn]:
        turns = self._pick(_GREETINGS, _GREETING_ANSWERS)
        if self._chance.random() < 0.35:
            turns += self._pick(_MOODS, _MOOD_ANSWERS)
        return turns if self._chance.random() < 0.85 else self._pick(_MOODS, _MOOD_ANSWERS)

    def _thanks(self) -> list[Turn]:
        return self._pick(_THANKS, _THANKS_ANSWERS) if self._chance.random() < 0.6 else self._pick(_BYES, _BYE_ANSWERS)

    def _identity(self) -> list[Turn]:
        who, trained, trust = _ABOUT
        draw = self._chance.random()
        if draw < 0.45:
            return [(self._chance.choice(_WHO), f"{who} {trained} {trust}")]
        if draw < 0.6:
            return [
                (self._chance.choice(_TRAINED), f"{trained} I am a very small demonstration model shipped with octavo.")
            ]
        if draw < 0.75:
            return [(self._chance.choice(_TRUST), f"I am a very small demonstration model and often wrong. {trust}")]
        return self._pick(_CAN, _CAN_ANSWERS)

    def _python(self) -> list[Turn]:
        name, sentence = self._chance.choices(self._facts, self._fact_weights)[0]
        is_module = name in _MODULES or name == "os.path"
        subject = f"the {name} module" if is_module else name
        question = self._chance.choice(
            (
                "What does {} do?",
                "What is {}?",
                "Explain {}.",
                "What is {} for?",
                "Tell me about {}.",
                "what does {} do",
            )
            if is_module or "." in name
            else ("What does {} do?", "What does {} do in Python?", "What is {} in Python?", "What does {}() do?")
        ).format(subject)
        opening = self._chance.choice(("", "", f"This is what the documentation says about {name}: "))
        return [(question, opening + sentence)]

    def _word(self) -> list[Turn]:
        sense = self._chance.choices(self._senses, self._sense_weights)[0]
        article = "an" if sense.word[0] in "aeiou" else "a"
        asked = {
            "n": (f"What is {article} {sense.word}?", f'What does "{sense.word}" mean?', f"Define {sense.word}."),
            "v": (f"What does it mean to {sense.word}?", f"What does {sense.word} mean?", f"Define {sense.word}."),
            "a": (f"What does {sense.word} mean?", f'What does "{sense.word}" mean?', f"Define {sense.word}."),
        }[sense.part]
        gloss = sense.gloss[0].upper() + sense.gloss[1:] + "."
        turns = [(self._chance.choice(asked), gloss)]
        examples = [example for example in sense.examples if 3 <= len(example.split()) <= 14]
        if examples and self._chance.random() < 0.4:
            example = self._chance.choice(examples).rstrip(".?! ")
            asked_more = (
                "Give me an example.",
                "For example?",
                f"Use {sense.word} in a sentence.",
                "Show me an example.",
            )
            turns.append((self._chance.choice(asked_more), example[0].upper() + example[1:] + "."))
        return turns

    def _count(self) -> list[Turn]:
        chance = self._chance
        first = chance.choice((1, 1, 1, chance.randint(0, 12)))
        last = first + chance.randint(2, 9)
        numbers = [str(number) for number in range(first, last + 1)]
        if chance.random() < 0.2:
            return [(f"Count down from {last} to {first}.", ", ".join(reversed(numbers)) + ".")]
        if last <= 20 and chance.random() < 0.25:
            return [(f"Count from {_NUMBERS[first]} to {_NUMBERS[last]}.", ", ".join(_NUMBERS[first : last + 1]) + ".")]
        if first == 1 and chance.random() < 0.6:
            return [(f"Count to {last}.", ", ".join(numbers) + ".")]
        return [(f"Count from {first} to {last}.", ", ".join(numbers) + ".")]

    def _capital(self) -> list[Turn]:
        country, city = self._chance.choice(list(_CAPITALS.items()))
        if self._chance.random() < 0.25:
            return [(f"Where is {city}?", f"{city} is the capital of {country}.")]
        question = self._chance.choice(
            ("What is the capital of {}?", "Name the capital of {}.", "Which city is the capital of {}?")
        )
        return [(question.format(country), f"The capital of {country} is {city}.")]

    def _opposite(self) -> list[Turn]:
        one, other = self._chance.choice(_OPPOSITES).split()
        question = self._chance.choice(("What is the opposite of {}?", "Give me the opposite of {}."))
        return [(question.format(one), f"The opposite of {one} is {other}.")]

    def _list(self) -> list[Turn]:
        if self._chance.random() < 0.3:
            animal, sound = self._chance.choice(list(_SOUNDS.items()))
            return [(f"What sound does a {animal} make?", f"A {animal} {sound}.")]
        kind, items = self._chance.choice(list(_LISTS.items()))
        number = self._chance.randint(2, 4)
        chosen = (
            items.split()[:number]
            if "of the" in kind or kind == "months"
            else self._chance.sample(items.split(), number)
        )
        question = self._chance.choice(("Name {} {}.", "List {} {}.", "Give me {} {}.", "Can you name {} {}?"))
        return [(question.format(_NUMBERS[number], kind), ", ".join(chosen[:-1]) + f" and {chosen[-1]}.")]

    def _fact(self) -> list[Turn]:
        question, answer = self._chance.choice(_FACTS)
        return [(question.replace("{octavo}", "octavo"), answer)]

    def _repeat(self) -> list[Turn]:
        words = self._chance.sample(self._words, self._chance.randint(1, 5))
        if self._chance.random() < 0.3:
            words = [self._chance.choice(("hello", "good morning", "I like", "the")), *words[:2]]
        text = " ".join(words)
        question = self._chance.choice(
            ('Say "{}".', "Repeat after me: {}", "Repeat: {}", "Please repeat: {}", "Say {}")
        )
        return [(question.format(text), text)]

    def _story(self) -> list[Turn]:
        chance = self._chance
        hero, place, find, friend = map(chance.choice, (_HEROES, _PLACES, _FINDS, _FRIENDS))
        noun = hero.split(" ", 1)[1]
        found = find.split(" ", 1)[1]
        met = friend.split(" ", 1)[1]
        name = chance.choice(_NAMES)
        parts = [
            chance.choice((f"Once upon a time there was {hero} called {name} who lived in {place}.",
                           f"There once was {hero} who lived in {place}.", f"Long ago, {hero} lived in {place}.")),
            chance.choice((f"One day the {noun} found {find}.",
            f"One morning the {noun} went for a walk and saw {find}.",
                           f"One night the {noun} dreamed of {find} and went to look for it.")),
            chance.choice((f"On the way home the {noun} met {friend}.", f"Then {friend} came along.",
                           f"Nearby sat {friend}, who looked sad.")),
            chance.choice((f'"What a fine {found}!" said the {met}.',
            f'"That is my {found}," said the {met}. "I lost it."',
                           f'"Will you show me the {found}?" asked the {met}.')),
            chance.choice((f"The {noun} gave the {found} to the {met}, and they became friends.",
                           f"So they shared the {found} and were happy.",
                           f"The {noun} smiled, and they looked at the {found} together until the sun went down.")),
            chance.choice(("The end.", "And that is the end of the story.", "They lived happily ever after.")),
        ]  # fmt: skip
        asked = (
            "Tell me a story.",
            "Tell me a short story.",
            "Write a story.",
            "Write a short story.",
            "Once upon a time",
        )
        question = chance.choice((*asked, f"Tell me a story about {hero}.", f"Write a short story about {hero}."))
        return [(question, " ".join(parts))]

    def _sum(self) -> list[Turn]:
        a, b = self._chance.randint(0, 10), self._chance.randint(0, 10)
        if self._chance.random() < 0.3:
            a, b = max(a, b), min(a, b)
            return [(f"What is {a} - {b}?", f"{a} - {b} = {a - b}.")]
        if self._chance.random() < 0.3:
            return [(f"How much is {a} plus {b}?", f"{a} plus {b} is {a + b}.")]
        return [(f"What is {a} + {b}?", f"{a} + {b} = {a + b}.")]

    def _name(self) -> list[Turn]:
        name = self._chance.choice(_NAMES)
        told = self._chance.choice(("My name is {}.", "I am {}.", "Hello, I am {}.", "Hi, my name is {}.")).format(name)
        greeting = self._chance.choice(("Hello, {}! How can I help you?", "Nice to meet you, {}!", "Hello {}!")).format(
            name
        )
        turns = [(told, greeting)]
        if self._chance.random() < 0.3:
            turns += self._fact()
        turns.append(
            (
                self._chance.choice(("What is my name?", "Do you remember my name?", "Who am I?")),
                f"Your name is {name}.",
            )
        )
        return turns

    def _spell(self) -> list[Turn]:
        word = self._chance.choice([word for word in self._words[:300] if len(word) <= 6])
        return [(self._chance.choice((f"Spell {word}.", f'How do you spell "{word}"?')), "-".join(word.upper()) + ".")]

    def _unknown(self) -> list[Turn]:
        chance = self._chance
        question = chance.choice(_UNKNOWN).format(
            thing=chance.choice(self._words), year=chance.randint(1500, 2030), name=chance.choice(_NAMES),
            city=chance.choice(list(_CAPITALS.values())),
            language=chance.choice(("French", "German", "Latin", "Greek")),
        )  # fmt: skip
        return [(question, chance.choice(_UNKNOWN_ANSWERS))]
