/*
 * The what-if panel of capacity.html: knobs in, safe load, cards and cost out.
 *
 * It computes what the library computes: a function that does arithmetic names the one it mirrors, keeps its order of
 * operations, and is driven beside it over a grid of questions by tests/report/test_html_browser.py. What takes more
 * than arithmetic (levels out of repeats, the interval of a ratio) was done when the page was written, and lies in the
 * island #data; harness/report/whatif.py says what its parts are.
 *
 * @typedef {[?number, ?number, ?number]} Interval  a figure and the ends of its interval; null: not known
 * @typedef {{load: number, limits: Interval[], tok_s: Interval, req_s: ?number, verdict: string, usd_per_hour: ?number,
 *            utilisation: ?number, idle_usd: number, load_usd: number}} Level
 */

// --- figures, as harness.report writes them ---

/** A figure to so many decimals; of two that are equally near, the even one, as Python has it. */
function rounded(size, digits, write = (figure) => figure.toFixed(digits)) {
  const half = (size * 2 ** (digits + 1)) % 2 === 1; // exactly between: only then is this product a whole odd number
  return half && /[13579]$/.test(write(size)) ? write(size - 10 ** -digits / 4) : write(size);
}

/** tables.number. Three significant digits, thousands separated, empty for missing: 1,234  56.7  8.90  0.120. */
function number(value) {
  if (value === null) return "";
  if (value < 1) return rounded(value, 2 - Math.floor(Math.log10(value || 1)), (figure) => figure.toPrecision(3));
  return rounded(value, value >= 100 ? 0 : value >= 10 ? 1 : 2).replace(/\B(?=(\d{3})+$)/g, ",");
}

/** planning.percent, without its sign: 38  2.3  −0.12. */
function points(share) {
  const size = Math.abs(share) * 100;
  return (share < 0 ? "−" : "") + rounded(size, size >= 10 || size === 0 ? 0 : size >= 1 ? 1 : 2);
}

const percent = (share) => `${points(share)} %`;

/** A figure and its interval: 2.41 [2.30–2.55], 38 % [35–41], 4.0 % [−3.0 to 11]. */
function interval([value, lo, hi], show = number, showEnd = show) {
  if (value === null) return "";
  if (lo === null || hi === null) return show(value);
  return `${show(value)} [${showEnd(lo)}${lo < 0 || hi < 0 ? " to " : "–"}${showEnd(hi)}]`;
}

// --- formulas, as harness.analysis has them ---

/**
 * knee.standing, in a word: inside or outside the service level with the whole interval, else in doubt. Of users, a
 * level is surely outside only if none with more of them contradicts it.
 * @param {Level[]} levels @returns {("inside"|"outside"|"doubt")[]}
 */
function standing(levels, { most, closed }) {
  return levels.map(({ limits }, at) => {
    if (limits.every(([, , hi], i) => hi <= most[i])) return "inside";
    const later = closed ? levels.slice(at + 1) : [];
    const breaks = ([value, lo], i) => lo > most[i] && later.every((other) => value <= other.limits[i][2]);
    return limits.some(breaks) ? "outside" : "doubt";
  });
}

/** knee.safe_load: where the unbroken run of levels surely inside ends; -1: not even the smallest is. */
function safeAt(places) {
  const end = places.findIndex((found) => found !== "inside");
  return (end < 0 ? places.length : end) - 1;
}

/** cost.hour_usd, for a share of the hour under load; null where nobody gives a price. @param {Level} level */
function hourUsd(level, asked, share) {
  const { card_usd: card, host_usd: host, residual, years } = asked;
  const rent = asked.usd_per_hour ?? level.usd_per_hour;
  const capital = card === null ? rent : ((card + host) * (1 - residual)) / (years * (365.25 * 24));
  return capital === null || share === null ? null : capital + (level.idle_usd + share * level.load_usd);
}

/** cost.price: $/1M output tokens with its interval, whose ends are those of tok_s turned over. @returns {Interval} */
function price(level, usd, share) {
  const [tokens, lo, hi] = level.tok_s;
  return [tokens, hi, lo].map((rate) => (usd === null || !rate ? null : (usd / (rate * share * 3600)) * 1e6));
}

/** capacity.plan_cards; null without a demand that can be judged. @param {Level} level */
function plan(level, asked) {
  const { users, requests_per_day: daily, headroom, failover } = asked;
  const kept = 1 - headroom;
  const peak = asked.peak_rps ?? (daily === null ? null : (daily / 86400) * asked.peak_factor);
  const byUsers = users === null || !asked.closed ? null : users / (level.load * kept);
  const byRequests = peak === null || !level.req_s ? null : peak / (level.req_s * kept);
  if (byUsers === null && byRequests === null) return null;
  const wanted = Math.max(byUsers ?? 0, byRequests ?? 0);
  const forLoad = whole(wanted);
  const cards = forLoad + failover;
  const [tokens, lo, hi] = level.tok_s; // requests a second rise and fall with them
  const atPace = (pace) => whole(Math.max(byUsers ?? 0, (byRequests ?? 0) / pace)) + failover;
  return {
    cards: [cards, ...[hi, lo].map((end) => (tokens && end ? atPace(end / tokens) : null))],
    forLoad,
    boundBy: wanted === byUsers ? "users" : "requests",
    peak: (wanted * kept) / cards,
    mean: daily === null || !level.req_s ? null : daily / 86400 / (cards * level.req_s),
  };
}

/** Cards come whole; nine decimals first, or 10 users × (1 − 0.9) would not carry 1. */
const whole = (cards) => Math.max(1, Math.ceil(Number(cards.toFixed(9))));

/** One precision under what is asked: the level that is safe, and what it makes of cards and money. */
function answer(precision, asked) {
  const places = standing(precision.levels, asked);
  const at = safeAt(places);
  const level = precision.levels[at] ?? null;
  if (!level) return { places, at, level, usd: null, paid: [null, null, null], fleet: null, month: null };
  const share = asked.utilisation ?? level.utilisation;
  const usd = hourUsd(level, asked, share);
  const fleet = plan(level, asked);
  // spend.spends: the expected traffic, where it is known, says how long the cards are under load.
  const spent = usd === null || !fleet || fleet.mean === null ? usd : hourUsd(level, asked, fleet.mean);
  const month = fleet && spent !== null ? fleet.cards[0] * 24 * spent * (365.25 / 12) : null;
  return { places, at, level, share, usd, paid: price(level, usd, share), fleet, month };
}

/** saving.savings: the share by which a token costs less than the baseline's, each at its own safe load. */
function saving(precision, own, base) {
  if (!base.usd || own.usd === null) return [null, null, null];
  const hours = own.usd / own.share / (base.usd / base.share);
  return precision.per_token[base.at][own.at].map((cost) => (cost === null ? null : 1 - hours * cost));
}

// --- the panel: what is asked, what is answered ---

const data = JSON.parse(document.getElementById("data").textContent);
const form = document.getElementById("knobs");
const inputs = [...form.querySelectorAll("input[type=number]")];

/** What the knobs ask. One that was not touched asks what the report assumed, to the last digit. */
function question() {
  const asked = { ...data.assumptions, closed: data.closed };
  for (const input of inputs) {
    if (input.value === input.defaultValue) continue;
    asked[input.id] = input.value === "" ? null : Number(input.value) / Number(input.dataset.parts);
  }
  asked.most = data.limits.map((limit) => (limit === "goodput" ? 1 - asked.goodput : asked[limit] * 1e3));
  return asked;
}

/** A tested load: 16, 0.125; the mean rate of a trace has no end, and is cut to 2.487. */
const shown = (load) => String(Number.isInteger(load) ? load : Number(load.toPrecision(4)));
const amount = (load) => (load === 1 && data.closed ? "1 user" : `${shown(load)} ${data.unit}`);

/** The answers for one precision, line by line: label, name, figure, its words, what stands below in small print. */
function lines({ places, level, fleet, paid, month }, saved, { levels, standing: role }) {
  const signs = { inside: "✓", doubt: "?", outside: "✗" };
  const tested = levels.map(({ load }, at) => `${shown(load)}\u00a0${signs[places[at]]}`).join("  ");
  return [
    [`Tested ${data.unit}`, "tested", null, tested],
    ["Safe load of a card", "safe", level && level.load, level ? amount(level.load) : "none"],
    ["Verdict on it", "verdict", null, level ? level.verdict : ""],
    ["Output tokens a second", "tok_s", level && level.tok_s[0], level ? interval(level.tok_s) : ""],
    ["USD/1M output tokens", "price", paid[0], interval(paid)],
    [`Saving against ${data.baseline}`, "saving", saved && saved[0], saved ? compared(saved) : role],
    ["Cards", "cards", fleet && fleet.cards[0], fleet ? cards(fleet) : "", level && reserve(fleet)],
    ["Full at the peak", "peak", fleet && fleet.peak, fleet ? percent(fleet.peak) : ""],
    ["USD a month, all cards", "month", month, number(month)],
  ].filter(([, name]) => name !== "saving" || data.precisions.length > 1);
}

/** 6, and 6 [6–7] where the interval says that it may be another number. */
const cards = ({ cards: [count, lo, hi] }) => interval(lo === hi ? [count, null, null] : [count, lo, hi], String);
const reserve = (fleet) =>
  fleet ? `${fleet.forLoad} for the ${fleet.boundBy}, ${fleet.cards[0] - fleet.forLoad} in reserve` : "no traffic is given";

/** 38 % [35–41], and what may be none is undecided. */
function compared(saved) {
  const undecided = saved[1] !== null && saved[2] !== null && saved[1] <= 0 && saved[2] >= 0;
  return interval(saved, percent, points) + (undecided ? ", undecided" : "");
}

/** The same in a sentence, which is also what a screen reader is told. */
function sentence(answers, savings) {
  const words = answers.map(({ level, fleet, paid }, at) => {
    const parts = [level ? `${amount(level.load)} a card` : "no safe load"];
    if (fleet) parts.push(`${fleet.cards[0]} ${fleet.cards[0] === 1 ? "card" : "cards"}`);
    if (paid[0] !== null) parts.push(`${number(paid[0])} USD per 1M output tokens`);
    if (savings[at] && savings[at][0] !== null) parts.push(`saving ${compared(savings[at])}`);
    return `${data.precisions[at].name}: ${parts.join(", ")}.`;
  });
  return words.join("\n");
}

/** Compute and show. A figure that is not allowed is named, and the answers stay as they were, faint. */
function update() {
  const asked = question();
  const peak = document.getElementById("peak_rps"); // there if it was given, and so it may contradict the day's mean
  peak?.setCustomValidity(asked.peak_rps * 86400 < asked.requests_per_day ? "below the day's mean rate" : "");
  const wrong = inputs.filter((input) => !input.checkValidity());
  for (const input of inputs) input.setAttribute("aria-invalid", String(wrong.includes(input)));
  document.getElementById("answers").classList.toggle("stale", wrong.length > 0);
  if (wrong.length) return say(`${wrong[0].labels[0].textContent}: ${wrong[0].validationMessage}`);
  const answers = data.precisions.map((precision) => answer(precision, asked));
  const savings = answers.map((own, at) => {
    const { base } = data.precisions[at];
    return base === null ? null : saving(data.precisions[at], own, answers[base]);
  });
  show(answers.map((found, at) => lines(found, savings[at], data.precisions[at])));
  return say(sentence(answers, savings));
}

/** The table of answers: a row for each line, a column for each precision. */
function show(columns) {
  const rows = columns[0].map(([label, name], at) => {
    const row = element("tr", "", { id: `answer-${name}` });
    row.append(element("th", label, { scope: "row" }));
    for (const column of columns) {
      const [, , figure, words, small] = column[at];
      const cell = element("td", words, { className: name === "verdict" ? words : "" });
      cell.dataset.value = figure ?? "";
      if (small) cell.append(element("small", small));
      row.append(cell);
    }
    return row;
  });
  document.querySelector("#answers tbody").replaceChildren(...rows);
}

/** An element with text in it, which is never read as HTML. */
function element(tag, text, properties) {
  const made = Object.assign(document.createElement(tag), properties);
  made.append(text);
  return made;
}

let telling = 0;

/** Say it when the hand has come to rest: a screen reader would read out every step of a slider. */
function say(words) {
  clearTimeout(telling);
  telling = setTimeout(() => document.getElementById("said").replaceChildren(words), 200);
}

// --- sliders: another hand on the same numbers ---

const sliders = new Map(inputs.map((input) => [input, form.querySelector(`[data-for="${input.id}"]`)]));

/** Between `from` and `to` the steps are factors; the first one is "none" where the number may be missing. */
function fromSlider(slider, input) {
  const { from, to } = slider.dataset;
  if (from === undefined) return slider.value;
  if (!input.required && slider.value === "0") return "";
  const value = from * (to / from) ** (slider.value / slider.max);
  return String(input.step === "1" ? Math.round(value) : Number(value.toPrecision(3)));
}

/** A slider that stands for the number already stays where the hand has put it, or it could not leave a rounded one. */
function toSlider(slider, input) {
  const { from, to } = slider.dataset;
  slider.setAttribute("aria-valuetext", input.value === "" ? "none" : `${input.value} ${input.dataset.unit}`.trim());
  if (fromSlider(slider, input) === input.value) return;
  const at = from === undefined ? input.value : (slider.max * Math.log(input.value / from)) / Math.log(to / from);
  slider.value = input.value === "" ? 0 : Math.max(at, input.required ? 0 : 1);
}

function refresh() {
  for (const [input, slider] of sliders) toSlider(slider, input);
  update();
}

// --- the address, which holds what was changed ---

function changed() {
  refresh();
  const values = inputs.filter((input) => input.value !== input.defaultValue).map(({ id, value }) => [id, value]);
  const bare = location.pathname + location.search;
  history.replaceState(null, "", values.length ? `#${new URLSearchParams(values)}` : bare);
}

function fromAddress() {
  const given = new URLSearchParams(location.hash.slice(1));
  const chapter = location.hash && !inputs.some(({ id }) => given.has(id));
  if (!chapter) for (const input of inputs) input.value = given.get(input.id) ?? input.defaultValue;
  refresh();
}

// --- begin ---

for (const part of document.querySelectorAll("[data-live]")) part.hidden = false;
for (const [input, slider] of sliders) {
  input.addEventListener("input", changed);
  slider.addEventListener("input", () => {
    input.value = fromSlider(slider, input);
    changed();
  });
}
form.addEventListener("submit", (event) => event.preventDefault());
form.addEventListener("reset", (event) => {
  event.preventDefault(); // the browser would set the sliders back to the middle, and after us
  for (const input of inputs) input.value = input.defaultValue;
  changed();
});
addEventListener("hashchange", fromAddress);
fromAddress();
