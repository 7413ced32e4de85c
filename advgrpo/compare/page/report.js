'use strict'

const $ = id => document.getElementById(id)
const data = JSON.parse($('data').textContent)

function make(tag, className = '', text = '') {
  const element = document.createElement(tag)
  element.className = className
  element.textContent = text
  return element
}

const percent = (share, digits = 0) => share === null ? '–' : `${(100 * share).toFixed(digits)} %`
const bounds = (estimate, shown) =>
  estimate.low === null ? shown(estimate.value) : `${shown(estimate.value)} [${shown(estimate.low)}, ${shown(estimate.high)}]`

// A dot with its interval on a scale from `from` to `to`; a dotted line marks `zero`.
function scale(estimate, from, to, zero) {
  const place = value => 100 * (value - from) / (to - from)
  const box = make('div', 'scale')
  box.setAttribute('aria-hidden', 'true')
  box.style.setProperty('--zero', `${place(zero)}%`)
  if (estimate.low !== null) {
    const line = make('i')
    line.style.left = `${place(estimate.low)}%`
    line.style.width = `${place(estimate.high) - place(estimate.low)}%`
    box.append(line)
  }
  const dot = make('b')
  dot.style.left = `${place(estimate.value)}%`
  box.append(dot)
  return box
}

const colour = side => `var(--side-${data.sides.indexOf(side) % 6})`

function meeting(each) {
  const box = make('div', 'meeting'), names = make('div', 'names'), shares = make('div', 'shares')
  names.append(make('span', '', each.side), make('span', '', each.against))
  for (const [role, side] of [['--first', each.side], ['--second', each.against]]) {
    box.style.setProperty(role, colour(side))
  }
  const total = each.wins + each.ties + each.losses
  for (const kind of ['wins', 'ties', 'losses']) {
    if (!each[kind]) continue
    const part = make('i', kind, each[kind] / total > .06 ? String(each[kind]) : '')
    part.style.flex = String(each[kind])
    part.title = `${each[kind]} ${kind}`
    shares.append(part)
  }
  shares.setAttribute('aria-hidden', 'true')
  const figures = make('p', 'figures')
  figures.append(make('strong', '', `${each.side} wins ${bounds(each.win_rate, value => percent(value))}`),
    ` against ${each.against}: ${each.wins} wins, ${each.ties} ties, ${each.losses} losses`)
  box.append(names, shares, scale(each.win_rate, 0, 1, .5), figures)
  return box
}

function strengths(bySide) {
  const all = Object.values(bySide).flatMap(each => [each.low ?? each.value, each.high ?? each.value, 0])
  const room = .05 * (Math.max(...all) - Math.min(...all)) || 1
  const box = make('div', 'strengths')
  const signed = value => (value >= .005 ? '+' : '') + (Math.round(100 * value) / 100 || 0).toFixed(2)
  box.append(...Object.entries(bySide).sort((a, b) => b[1].value - a[1].value).map(([side, each]) => {
    const line = make('div', 'strength'), name = make('span', '', side)
    name.style.color = colour(side)
    line.append(name, scale(each, Math.min(...all) - room, Math.max(...all) + room, 0),
      make('span', 'figures', bounds(each, signed)))
    return line
  }))
  return box
}

function panel(each) {
  const box = make('section', 'panel'), head = make('header')
  const agreement = each.agreement === null ? 'no two raters to compare'
    : `agreement ${each.agreement.toFixed(2)} over ${each.shared_pairs} shared pairs`
  head.append(make('h2', '', data.questions[each.question]), make('span', 'figures', agreement))
  box.append(head, ...each.meetings.map(meeting))
  if (data.sides.length > 2) box.append(make('h3', '', 'Strength (Bradley-Terry, 0 is the mean)'), strengths(each.strengths))
  return box
}

function row(rater) {
  const line = make('tr', rater.counts ? '' : 'out')
  const cells = [rater.name, rater.pairs, `${rater.passed} of ${rater.checks}`, percent(rater.tie_share),
    percent(rater.left_share), rater.seconds.toFixed(1), rater.counts ? '' : 'left out']
  line.append(...cells.map(text => make('td', '', String(text))))
  return line
}

const counted = data.raters.length - data.left_out
const plural = (count, word) => `${count} ${word}${count === 1 ? '' : 's'}`
$('lead').textContent = `${plural(data.votes, 'vote')} by ${plural(counted, 'rater')} on ${plural(data.prompts, 'prompt')}; ` +
  `${Math.round(100 * data.confidence)} % intervals.`
$('notes').append(...data.notes.map(text => make('li', '', text)))
$('notes').hidden = !data.notes.length
$('answers').append(...data.answers.map(panel))
$('raters-table').append(...data.raters.map(row))
