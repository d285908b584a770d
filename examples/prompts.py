"""General prompts, to train exits and drafters on a model's own answers to them: one a line.

    python examples/prompts.py > prompts.txt
    offramp train smollm2 --trainable drafter --prompts prompts.txt

None of them asks what the demonstration asks, about things that it does not ask about.
"""

import random

TOPICS = """
acids and bases, advertising, agriculture, airports, alarm systems, allergies, aluminium, amphibians, ancient Egypt,
antibiotics, ants, apples, archaeology, architecture, astronauts, atoms, autumn leaves, avalanches, babies, backpacks,
bacteria, badgers, ball games, balloons, bamboo, banks, basketball, bats, batteries, beaches, bears, bees, beetles,
bicycles, birdsong, black holes, blood pressure, board games, boats, bones, bookkeeping, bread, breakfast, breathing,
bricks, budgets, buses, butter, butterflies, cactuses, calendars, camels, cameras, camping, canals, carbon, carpets,
cats, caves, cement, cheese, chemistry, chess, chocolate, choirs, cities, city planning, climate change, cloth,
clouds, coal, coasts, coffee, cold weather, colours, compost, computer memory, computer screens, concrete,
constitutions, contracts, cooking rice, copper, copyright, coral reefs, corn, cotton, courts, cows, crabs, credit
cards, crows, crystals, customs, dams, dancing, databases, debates, deer, democracy, dentists, diamonds, diets,
dinosaurs, diseases, dogs, dolphins, donkeys, doors, drawing, dreams, drinking water, drums, ducks, dust, eagles,
earthquakes, echoes, economics, education, eggs, elections, electric cars, electricity, elephants, elevators, emails,
emergency services, encryption, energy, engines, ethics, evolution, exams, exercise, experiments, eyes, factories,
fairy tales, family trees, farming, fashion, fermentation, ferns, festivals, film making, fire safety, first aid,
fish, flags, floods, flour, flowers, flutes, fog, folk tales, food safety, football, fossils, fractions, friendship,
frogs, fruit trees, fuel, furniture, galaxies, gardening, gases, genes, geography, geometry, ghosts in stories, glass,
goats, gold, golf, good manners, governments, GPS navigation, grammar, grapes, grass, gravity, guitars, haircuts,
handwriting, hats, headaches, healthy snacks, hearing, hearts, heating, helicopters, herbs, hibernation, hiking,
hills, history books, hobbies, holidays, homework, honey, horses, hospitals, hotels, houseplants, humour, hurricanes,
ice, inflation, ink, insects, insulation, insurance, interest rates, inventions, iron, islands, jackets, jam, jazz,
jellyfish, jet engines, job interviews, journalism, juggling, jungles, kangaroos, keyboards, kites, kitchens, kittens,
knives, knots, lakes, lamps, languages, lasers, laughter, laundry, laws, leadership, learning a language, leather,
lemons, lenses, letters, light, lightning, lions, listening, lizards, logic, lullabies, lungs, machine learning, magic
tricks, magnets, mammals, marathons, marketing, mathematics, measuring time, meat, medicine, meetings, melons, memory,
metals, meteors, mice, microscopes, microwave ovens, migration of birds, milk, minerals, mobile phones, money,
monkeys, moods, moss, moths, motorways, mountains, moving house, muscles, mushrooms, music lessons, myths, names,
negotiation, neighbours, nests, noise, noodles, nuclear power, numbers, nurses, nutrition, nuts, oak trees, oceans,
octopuses, oil, olives, onions, opera, optical illusions, oranges, orchestras, organ donation, owls, oxygen,
packaging, paint, painting, paper, parenting, parks, parrots, passwords, patience, penguins, pensions, pepper,
perfume, philosophy, photography, photosynthesis, pigeons, pigs, pilots, pipes, planets, plastic, plumbing, poetry,
police work, politeness, pollen, ponds, postage stamps, potatoes, pottery, prime numbers, printers, probability,
programming languages, proverbs, public speaking, pulleys, puppets, puzzles, pyramids, rabbits, rain, rainbows,
rainforests, reading aloud, recipes, recycling, refrigerators, remote work, reptiles, restaurants, rhymes, rice,
roads, robots, rockets, roofs, roots, ropes, roses, rowing, rubber, running, safety belts, salads, salt, sand,
satellites, saving money, scales, scarves, school meals, science fiction, scissors, sculpture, search engines,
seasons, seeds, sewing, sharks, sheep, shells, ships, shoes, shopping lists, shyness, silk, silver, singing, skating,
skiing, skin, sleep, smells, smoke, snails, snakes, snow, soap, social media, soil, solar panels, soup, space
stations, spelling, spices, sports, squirrels, stars, statistics, steam engines, steel, stories, storms, strawberries,
stress, submarines, sugar, sundials, sunflowers, surprise, swans, swimming, tables and charts, taxes, tea, teamwork,
teeth, tennis, tents, the brain, the human eye, the immune system, the Industrial Revolution, the internet, the moon,
the printing press, the Renaissance, the Roman Empire, the scientific method, the Silk Road, the stomach, the sun, the
tides, the United Nations, the water cycle, thermometers, thunder, tigers, time management, time zones, tomatoes,
tools, tourism, town halls, toys, trade, traffic, traffic lights, translation, travelling light, trees, trust,
tunnels, turtles, twins, typing, university, vaccines, vegetables, video games, vinegar, viruses, vitamins,
volunteering, voting, walking, walls, wasps, watches, water wheels, waterfalls, weather forecasts, weaving, weddings,
weights, wells, whales, wheat, wheels, whistles, wind, wind turbines, windows, wine, winter, wolves, wood, wool,
words, work and rest, worms, writing systems, yoga, zebras, zoos
"""
FORMS = (
    "How does one explain {} to a child?", "What are the main facts about {}?", "Why do people care about {}?",
    "Explain the basics of {} in simple terms.", "Write a short paragraph about {}.",
    "Give three tips that have to do with {}.", "What are common misunderstandings about {}?",
    "Describe the history of {} in a few sentences.",
    "List five words that have to do with {}, and say what each means.", "What should a beginner know about {}?",
    "How has our view of {} changed over time?", "What are the advantages and disadvantages that people see in {}?",
    "Write a short story in which {} matter.", "Answer in two sentences: why are there {}?",
    "Write a dialogue of two friends about {}.", "Ask me three questions about {}, and answer them.",
    "Write four lines of verse about {}.", "Write an email to a colleague about {}.",
    "How do {} differ from what most people think?", "What can go wrong with {}, and what helps?",
)  # fmt: skip
ERRANDS = """
Write a polite email to a landlord about a broken heater.
Write a short letter of thanks to a coach.
Write a to-do list for a birthday party.
Plan a weekend in a small town by the sea.
Suggest a simple breakfast for four people.
Write a two-sentence advertisement for a second-hand bicycle.
Write a short story about a dog that finds a key.
Write a dialogue between a baker and a customer.
How do I remove a coffee stain from a shirt?
How do I boil an egg so that the yolk stays soft?
How can I fall asleep more easily?
How can I save money on groceries?
What should I pack for a week in the mountains?
Give me a recipe for pancakes.
Give me a recipe for a vegetable stew.
How do I write a good cover letter?
How do I train for a ten-kilometre run?
Explain the difference between a virus and a bacterium.
Explain the difference between a play and a short story.
Explain the difference between speed and velocity.
Explain the difference between a loan and a mortgage.
What is the capital of Italy, and what is it known for?
What is the longest river in the world?
Who was Isaac Newton?
Who was Marie Curie?
Who wrote Romeo and Juliet, and what is it about?
What happened in 1969?
Translate into French: Where is the station?
Translate into Spanish: I would like a glass of water.
Rewrite this politely: Give me the report now.
Rewrite this in the past tense: She walks to school and meets her friend.
Correct the grammar: He don't like apples.
Summarise in one sentence: The meeting began late, nobody had the numbers, and it was moved to Friday.
Summarise in one sentence: The shop opens at nine, closes at six, and on Sundays it stays shut.
What is 17 plus 26?
What is 12 times 9?
Sort these words by the alphabet: pear, apple, fig, lemon.
Name five animals that live in the sea.
Name three countries in South America and their capitals.
Write a haiku about snow.
"""
EACH = 5
"""Forms for every topic, drawn at random."""


def prompts(seed: int = 0) -> list[str]:
    """All of them, shuffled."""
    draw = random.Random(seed)
    topics = [" ".join(topic.split()) for topic in TOPICS.split(",")]
    made = [form.format(topic) for topic in topics for form in draw.sample(FORMS, EACH)]
    made += ERRANDS.strip().splitlines()
    draw.shuffle(made)
    return made


if __name__ == "__main__":
    print("\n".join(prompts()))
