"""The words of synthetic tasks: short, plain, and so few that a small vocabulary has each as one token."""

_ADJECTIVES = """
    red blue green pink gray brown white black gold pale dark light warm cold hot cool dry wet big small tall short
    long wide thin fat deep flat round sharp soft hard rough loud quiet calm wild tame shy bold brave kind rude proud
    humble happy sad glad angry lazy busy quick slow early late old young new fresh ripe raw sweet sour salty bitter
    rich poor plain fancy clean dirty shiny dusty foggy sunny rainy windy snowy misty rare odd even lucky noisy sleepy
    hungry tiny giant heavy strong weak smart silly funny honest polite
"""
_NOUNS = """
    fox owl cat dog elk bear wolf lion tiger horse goat sheep cow pig duck goose swan crow hawk eagle robin crane
    frog toad snake whale shark seal crab clam trout salmon bee ant moth wasp spider mouse rat mole hare otter camel
    zebra panda koala lemur tree oak pine elm maple birch rose lily tulip daisy fern moss grass wheat corn rice bean
    pea leek onion garlic carrot potato apple pear plum peach cherry grape lemon lime mango melon berry fig nut bread
    cake pie soup salad cheese butter milk honey sugar salt pepper tea coffee juice water wine river lake ocean pond
    creek beach island hill valley cliff cave desert forest meadow field farm barn mill bridge tower castle palace
    temple church house cabin tent hotel school shop bank harbor boat ship canoe raft train wagon truck plane rocket
    wheel engine anchor sail oar rope chain hook nail hammer saw drill axe shovel rake broom brush bucket barrel box
    basket bottle cup bowl plate spoon fork knife pan kettle oven stove lamp candle torch mirror clock watch bell drum
    flute violin piano harp guitar trumpet book letter pencil paper stamp coin ring crown jewel pearl ruby silver
    copper iron steel glass stone brick clay sand mud dust smoke fire flame ash snow ice rain storm thunder cloud wind
    star moon sun planet comet shirt coat hat scarf glove boot shoe sock belt button pocket blanket pillow chair table
    desk shelf door window wall roof floor garden fence gate road street tunnel market kitchen doctor pilot farmer
    baker sailor king queen prince judge poet painter dancer singer
"""
ADJECTIVES: tuple[str, ...] = tuple(_ADJECTIVES.split())
NOUNS: tuple[str, ...] = tuple(_NOUNS.split())
