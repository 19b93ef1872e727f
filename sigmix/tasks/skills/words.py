"""Word lists for the generated tasks: short, common English words, chosen for this package. Data only."""

from __future__ import annotations

# Members of one category only, so that the odd one out is never a matter of taste (no "orange", no "bat").
CATEGORIES: dict[str, list[str]] = {
    "animals": "cat dog horse cow pig sheep goat lion tiger bear wolf fox rabbit mouse frog camel zebra".split(),
    "fruits": "apple pear banana grape peach plum cherry lemon mango melon".split(),
    "colours": "red blue green yellow black white purple brown pink grey".split(),
    "clothes": "shirt coat hat sock shoe dress skirt glove scarf jacket".split(),
    "tools": "hammer saw drill axe shovel wrench pliers rake chisel screwdriver".split(),
    "vehicles": "car bus train truck bicycle boat plane tram ship van".split(),
    "furniture": "table chair bed sofa desk shelf stool bench wardrobe cupboard".split(),
    "instruments": "piano guitar violin drum flute trumpet harp cello".split(),
    "body parts": "hand foot arm leg nose ear mouth knee elbow finger".split(),
    "countries": "France Spain Italy Japan China Brazil Egypt India Peru Kenya".split(),
    "jobs": "doctor teacher baker farmer nurse lawyer painter pilot waiter plumber".split(),
    "weather": "rain snow wind fog hail storm thunder sunshine".split(),
    "metals": "iron gold silver copper tin lead zinc steel".split(),
    "drinks": "water milk tea coffee juice beer wine lemonade".split(),
}


# At least ten words for each of 20 letters, so that every first letter is as likely as any other.
COMMON: list[str] = """
able about above actor adult agree angle animal answer apple arm autumn
baby back bag ball bank basket bed bell bird boat book bottle box bread bridge brother
cake camp candle car card castle chair child city clock cloud coat coin corn cup
dance dark day deep desk dinner dish doctor door dream dress drive duck dust
eagle early earth east easy edge egg eight elbow empty energy enter evening
face family farm father field finger fire fish floor flower food forest friend fruit
game garden gate gift girl glass glove goat gold good grass green group guest
hair hand happy harbor hat heart heavy hill home honey horse hotel house hundred
ice idea inch ink inside iron island item ivory
jacket jam jar job join joke journey juice jump jungle
key kick kind king kitchen kite knee knife knock know
lake lamp land large leaf lemon letter library light lion list long lunch
machine map market match meal metal milk minute mirror money moon morning mother mouse music
name neck needle nest night nine noise north nose number nurse
ocean office old onion open orange order other outside oven
page paint paper park peace pencil people piano picture plant plate pocket potato prize
rabbit race rain read red rice ring river road rock room rope rose
sand school sea seed seven sheep ship shirt shoe shop silver sister snow song soup spoon star summer
table tall tea teacher tent test thing ticket tiger time toast tower town train tree truck
uncle under uniform unit until upper use useful usual
valley van vase very village violin visit voice vote
wagon walk wall warm watch water week west wheel white wind window winter wolf woman wood word
yard year yellow yes yogurt young
""".split()

NAMES: list[str] = """
Anna Ben Clara David Emma Frank Grace Henry Ivy Jack Kate Leo Maria Nick Olga Paul Rosa Sam Tina Victor
""".split()

OBJECTS: list[str] = "cup ball key book hat pen bag lamp coin spoon box clock map ring phone brush bottle plate".split()

PLACES: list[str] = "kitchen garden office bathroom garage bedroom park library school shop station market".split()

COLOURS: list[str] = CATEGORIES["colours"]

CITIES: list[str] = "Rome Paris London Berlin Madrid Oslo Tokyo Cairo Lima Vienna Dublin Athens Prague Boston".split()

GOODS: list[str] = "apple bread cake cheese cup egg hat lamp milk pen rice shirt soap sock tea toy".split()

NONSENSE: list[str] = "blips wugs dax norks zorps mibs fleps grobs trims yons plims quibs".split()

MONTHS: list[str] = "January February March April May June July August September October November December".split()


# singular plural, in turn
_PLURALS = """
apple apples ball balls bird birds boat boats book books bottle bottles boy boys car cars chair chairs cloud clouds
coin coins cup cups day days dog dogs door doors egg eggs farm farms flower flowers friend friends game games
garden gardens girl girls hand hands horse horses house houses key keys king kings lamp lamps letter letters
map maps mountain mountains number numbers page pages park parks picture pictures plate plates ring rings
river rivers road roads school schools ship ships shoe shoes song songs star stars table tables teacher teachers
toy toys tree trees truck trucks wall walls window windows word words year years monkey monkeys piano pianos
photo photos radio radios roof roofs chief chiefs
ant ants arm arms bag bags bank banks bear bears bed beds bell bells bike bikes bridge bridges brother brothers
button buttons cake cakes camp camps candle candles card cards castle castles circle circles clock clocks coat coats
cook cooks cow cows desk desks doctor doctors dream dreams drum drums duck ducks ear ears engine engines eye eyes
farmer farmers field fields finger fingers floor floors forest forests frog frogs glove gloves goat goats hat hats
hill hills island islands jacket jackets lake lakes lesson lessons lion lions market markets mirror mirrors moon moons
neck necks nest nests nose noses nurse nurses ocean oceans office offices orange oranges oven ovens paper papers
pocket pockets poem poems prize prizes rabbit rabbits
box boxes bus buses dish dishes fox foxes glass glasses match matches watch watches brush brushes class classes
beach beaches bench benches church churches dress dresses kiss kisses lunch lunches peach peaches sandwich sandwiches
tax taxes wish wishes branch branches inch inches boss bosses
baby babies city cities country countries family families lady ladies party parties story stories berry berries
puppy puppies cherry cherries body bodies army armies penny pennies library libraries factory factories fly flies
spy spies enemy enemies diary diaries
knife knives leaf leaves life lives wife wives wolf wolves shelf shelves thief thieves half halves loaf loaves
calf calves potato potatoes tomato tomatoes hero heroes echo echoes
child children man men woman women foot feet tooth teeth goose geese mouse mice ox oxen
""".split()
PLURALS: dict[str, str] = dict(zip(_PLURALS[::2], _PLURALS[1::2], strict=True))

# pairs of words, each with its other forms or opposites: word[/form...] opposite[/opposite...]
_OPPOSITES = """
hot cold|big/large small/little|tall short|up down|left right|happy sad/unhappy|day night|wet dry|open closed/shut
in out|early late|fast/quick slow|old young/new|new old|young old|rich poor|hard soft/easy|easy hard/difficult
light dark/heavy|heavy light|full empty|clean dirty/unclean|strong weak|thick thin|wide/broad narrow|deep shallow
high low|near far|loud quiet/soft|true false/untrue|right left/wrong|wrong right|good bad|first last|front back
top bottom|inside outside|begin/start end/stop/finish|buy sell|push pull|give take|love hate|win lose|laugh cry
come go|arrive leave/depart|remember forget|question answer|black white|north south|east west|summer winter
war peace|friend enemy|life death|alive dead|asleep awake|sweet sour/bitter|rough smooth|sharp blunt/dull
bright dim/dark|brave afraid/cowardly|polite rude/impolite|safe dangerous/unsafe|cheap expensive
simple complex/complicated|same different|always never|all none|before after|above below|over under|more less
many few|most least|everything nothing|everybody nobody|here there|yes no|on off|husband wife|brother sister
mother father|son daughter|uncle aunt|king queen|boy girl|man woman|male female|hero villain|teacher student
borrow lend|build destroy|accept refuse/reject|add subtract|multiply divide|increase decrease/reduce|rise fall/set
float sink|freeze melt/thaw|lock unlock|tie untie|fill empty|attack defend|ask answer|catch throw|create destroy
hide show|join separate/leave|lead follow|live die|pass fail|raise lower|save spend|send receive|sit stand
sunrise sunset|tight loose|public private|ancient modern|future past|entrance exit|maximum minimum|odd even
positive negative|guilty innocent|lazy busy/hardworking|success failure|victory defeat|natural artificial/unnatural
common rare/uncommon|temporary permanent|vertical horizontal|import export|include exclude|internal external
major minor|plural singular|present absent/past|proud ashamed/humble|raw/uncooked cooked|solid liquid|succeed fail
visible invisible|possible impossible|usual unusual|kind cruel/unkind|healthy sick/ill/unhealthy|honest dishonest
legal illegal|lucky unlucky|ugly beautiful|wild tame|fat thin|straight crooked/curved|together apart
up-to-date outdated|gain lose|advantage disadvantage|agree disagree|appear disappear|connect disconnect|like dislike
trust distrust|forward backward|upstairs downstairs|optimist pessimist|employer employee|host guest|heaven hell
floor ceiling|morning evening|noon midnight|truth lie
"""
OPPOSITES: list[tuple[str, str, list[str], list[str]]] = []
for _pair in _OPPOSITES.strip().replace("\n", "|").split("|"):
    _left, _right = (side.split("/") for side in _pair.split())
    OPPOSITES.append((_left[0], _right[0], _left, _right))
