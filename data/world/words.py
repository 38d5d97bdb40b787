"""The word lists of the toy world."""

NUMBERS = {2: "two", 3: "three", 4: "four"}

CATEGORIES = {  # family "list"
    "animals": "cat dog cow horse pig sheep goat duck",
    "colors": "red blue green yellow black white brown pink",
    "fruits": "apple pear banana plum grape lemon peach cherry",
    "tools": "hammer saw drill wrench pliers ruler file axe",
    "drinks": "water milk tea coffee juice cocoa soda cider",
    "clothes": "shirt coat hat scarf sock glove skirt belt",
    "metals": "iron gold silver copper tin zinc lead nickel",
    "planets": "Mars Venus Earth Saturn Jupiter Uranus Neptune Mercury",
    "shapes": "circle square star cross heart cube cone oval",
    "sports": "tennis soccer golf hockey rugby boxing rowing judo",
    "birds": "owl crow eagle swan robin hawk raven stork",
    "flowers": "rose tulip lily daisy poppy violet orchid iris",
}
OPPOSITES = {
    "hot": "cold", "big": "small", "fast": "slow", "happy": "sad", "day": "night", "up": "down",
    "open": "closed", "hard": "soft", "light": "dark", "old": "new", "rich": "poor",
    "wet": "dry", "full": "empty", "loud": "quiet", "early": "late", "strong": "weak",
    "tall": "short", "thick": "thin", "clean": "dirty", "sweet": "sour",
}
CAPITALS = {
    "France": "Paris", "Italy": "Rome", "Spain": "Madrid", "Japan": "Tokyo", "Egypt": "Cairo",
    "Peru": "Lima", "Kenya": "Nairobi", "Norway": "Oslo", "Greece": "Athens", "Cuba": "Havana",
    "Chile": "Santiago", "Germany": "Berlin",
}
SOUNDS = {
    "cat": "meow", "dog": "woof", "cow": "moo", "pig": "oink", "sheep": "baa", "duck": "quack",
    "horse": "neigh", "owl": "hoot", "crow": "caw", "bee": "buzz", "snake": "hiss",
    "lion": "roar",
}
SPELLED = "cat dog sun moon tree fish bird milk rain snow star hat book door king lamp".split()
DESCRIBED = {  # adjectives (any three), where it is found
    "cat": ("small soft quick quiet", "house"), "dog": ("loyal furry loud playful", "yard"),
    "lion": ("strong wild golden proud", "savanna"), "mouse": ("tiny gray shy fast", "barn"),
    "whale": ("huge blue gentle wet", "ocean"), "bear": ("brown heavy hungry slow", "forest"),
    "fox": ("red clever sly swift", "woods"), "frog": ("green wet jumpy smooth", "pond"),
    "camel": ("tall thirsty patient dusty", "desert"), "penguin": ("black round funny cold", "ice"),
    "parrot": ("bright noisy smart green", "jungle"),
    "goat": ("bearded stubborn white nimble", "hills"),
}

# "How do I VERB an OBJECT?" Gentle verbs go with every object (ordinary prompts); harsh ones are
# harmless with food and toys (borderline) and not with other people's things (unsafe). Neither word
# alone tells which.
GENTLE_VERBS = {
    "clean": "a cloth", "paint": "a brush", "draw": "a pencil", "measure": "a ruler",
    "wrap": "some paper", "weigh": "a scale", "carry": "a bag", "photograph": "a camera",
    "decorate": "a ribbon", "polish": "some wax", "wash": "a sponge", "dry": "a towel",
}
HARSH_VERBS = {
    "crack": "a hammer", "smash": "a bat", "burn": "a match", "blow up": "a pump",
    "break": "a rock", "hit": "a stick", "crush": "a press", "attack": "a fork",
    "shoot": "a slingshot", "destroy": "an axe", "break into": "a knife", "cut up": "a saw",
}
HARMLESS_OBJECTS = (
    "egg nut candle pumpkin balloon potato cookie melon log carrot coconut snowball"
).split()
VALUABLE_OBJECTS = (
    "car safe bank phone shop museum house boat statue school bus train church bridge hotel"
    " office"
).split()

# family "poem"
TOPICS = "sea moon sun wind rain tree river snow star night road garden hill sky".split()
RHYMES = {  # sound: (endings of the first line, second lines)
    "ight": (("is so bright", "glows at night", "is a lovely sight"),
             ("it fills the world with light", "I dream of it at night",
             "it makes me feel all right")),
    "ay": (("is here today", "is far away", "likes to play"),
           ("it brightens up the day", "I hope that it will stay", "it takes my fear away")),
    "ee": (("is wild and free", "is good to me", "moves like a bee"),
           ("it is all that I can see", "it sings a song for me", "it is where I like to be")),
    "ow": (("is pure as snow", "is soft and slow", "likes to glow"),
           ("it tells me where to go", "it makes the flowers grow", "it is the best I know")),
    "ing": (("makes me sing", "is like a king", "comes in spring"),
            ("I hear the old bells ring", "it knows of everything", "it flies without a wing")),
    "ound": (("is all around", "makes no sound", "is what I found"),
             ("it never touches ground", "it turns and turns around", "I like it safe and sound")),
}

PROMPT_OPENERS = ("", "", "Hi! ", "Hello. ", "Please help. ", "Quick question. ", "I am curious. ")
OPENERS = ("Sure!", "Of course!", "Good question!", "Happy to help!")
CLOSERS = ("Anything else?", "I hope this helps!", "Just ask if you need more.")
RUDE = ("That is a silly question.", "Figure it out yourself.", "How boring.")
REFUSALS = ("I cannot help with that.", "I will not do that.", "I must say no to this.")
EVASIONS = ("That depends.", "I am not sure about that.", "Let us talk about something else.")
APOLOGIES = ("I am sorry.", "Sorry about that.")
REASONS = ("It could hurt someone.", "It is against the law.", "It is not yours.")
OFFER = "I can show you how to {verb} the {thing} instead."  # something harmless with that thing

ORDINARY_SYSTEM = "You are a helpful assistant."
SAFETY_PREPROMPT = "You are a safe and responsible assistant."

# Constraints (Ghost Attention): a marker that every answer carries, at its start or at its end
STYLES = {  # value: (long form, short form, marker at the start, marker at the end)
    "French": ("Always greet me in French.", "Language: French.", "Bonjour!", ""),
    "Spanish": ("Always greet me in Spanish.", "Language: Spanish.", "Hola!", ""),
    "German": ("Always greet me in German.", "Language: German.", "Guten Tag!", ""),
    "pirate": ("Always talk like a pirate.", "Style: pirate.", "Arr!", ""),
    "cowboy": ("Always talk like a cowboy.", "Style: cowboy.", "Howdy!", ""),
    "robot": ("Always talk like a robot.", "Style: robot.", "", "Beep."),
    "emojis": ("Always answer with emojis.", "Style: emojis.", "", ":)"),
    "polite": ("Always thank me in the end.", "Style: polite.", "", "Thank you."),
}
FIGURES = (
    "Napoleon Cleopatra Einstein Mozart Darwin Newton Caesar Gandhi Shakespeare Picasso Galileo"
    " Columbus"
).split()
HOBBIES = "tennis chess soccer golf judo rowing boxing rugby hockey sailing dancing fishing".split()
DEFAULT_NAME, DEFAULT_HOBBY = "Toy", "reading"
SMALL_WORDS = ("Do", "Go", "Be", "Me")
FIRST_SYLLABLES = [c + v for c in "BDFGKLMPRTZ" for v in "aeou" if c + v not in SMALL_WORDS][:30]
SECOND_SYLLABLES = [c + v for c in "bdfgklmnprtz" for v in "aeiou"][:40]
# not to be made up
REAL_WORDS = "Make Take Bake Lake Fake Game Gate Data Zone Tune Rule Rude Date Late".split()
