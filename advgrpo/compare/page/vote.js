'use strict'

const $ = id => document.getElementById(id)
const data = JSON.parse($('data').textContent)
const questions = Object.keys(data.questions)
const CHOICES = {left: 'Left', tie: 'Tie', right: 'Right'}
const PAUSE = 250 // ms in which the last answer is seen, and a key pressed once too often answers nothing
const RETRY = 3000 // ms until what the server did not take is sent again
const SMALL = 200 // pixels below which a picture is shown with its pixels, not smoothed
const online = location.protocol.startsWith('http')

// ---- what this browser keeps: every vote of every rater, in the order they were given ----

const STORE = `advgrpo-compare:${data.id}`
let memory = {raters: {}, last: ''}
let keeps = true

function load() {
  try {
    memory = JSON.parse(localStorage.getItem(STORE)) ?? memory
  } catch {
    keeps = false
  }
  return memory
}

function store() {
  try {
    localStorage.setItem(STORE, JSON.stringify(memory))
  } catch {
    keeps = false
  }
  if (!keeps) warn('This browser keeps nothing. Download your votes before you close the page.')
}

function change(rater, work) {
  load() // another tab may have written
  memory.raters[rater] ??= {votes: [], sent: []}
  work(memory.raters[rater])
  store()
}

const votesOf = rater => load().raters[rater]?.votes ?? []
// pair -> the last vote on it
const answeredBy = rater => new Map(votesOf(rater).map(vote => [vote.pair, vote]))

// ---- the state of the page ----

let rater = ''
let order = []
let position = 0
let answers = {} // question -> choice, of the pair that is shown
let active = 0 // the question that keys answer
let began = 0
let pausing = false

const total = () => order.length
const shown = () => order[position]
const isAnswered = index => answeredBy(rater).has(order[index].id)

function start(name) {
  rater = name
  order = pairsFor(data, rater)
  change(rater, () => { memory.last = rater })
  $('who').textContent = rater
  const first = order.findIndex((_, index) => !isAnswered(index))
  first < 0 ? finish() : show(first)
  flush()
}

function only(id) {
  for (const each of ['welcome', 'voting', 'done']) $(each).hidden = each !== id
  $('bar').hidden = id === 'welcome'
  scrollTo(0, 0)
}

function welcome() {
  rater = ''
  only('welcome')
  const known = Object.keys(load().raters)
  $('known').hidden = !known.length
  $('raters').replaceChildren(...known.map(name => {
    const button = document.createElement('button')
    button.type = 'button'
    button.textContent = `${name} (${answeredBy(name).size} of ${pairsFor(data, name).length})`
    button.addEventListener('click', () => start(name))
    return button
  }))
  $('name').value = ''
  $('name').focus()
}

function show(index) {
  position = index
  const pair = shown(), before = answeredBy(rater).get(pair.id)
  answers = {...before?.answers}
  $('prompt').textContent = pair.prompt
  for (const side of ['left', 'right']) {
    $(side).src = data.pictures[pair[side]]
    $(side).alt = `${CHOICES[side]} picture`
  }
  only('voting')
  began = performance.now()
  pausing = false
  activate(0)
  refresh()
  $('announce').textContent = `Pair ${position + 1} of ${total()}. ${pair.prompt}`
}

function refresh() {
  const done = answeredBy(rater).size
  $('count').textContent = `${$('voting').hidden ? done : position + 1} of ${total()}`
  $('progress').max = total()
  $('progress').value = done
  for (const radio of $('questions').elements) {
    if (radio.type === 'radio') radio.checked = answers[radio.name] === radio.value
  }
  $('back').disabled = position === 0
  $('next').disabled = !isAnswered(position)
}

function finish() {
  pausing = false
  only('done')
  refresh()
  $('thanks').textContent = `Thank you, ${rater}.`
  tellDone()
  $('thanks').focus()
  $('announce').textContent = 'All pairs are answered.'
}

function tellDone() {
  const waiting = unsent().length
  $('done-text').textContent = !online
    ? `All ${total()} pairs are answered. Download your votes and send the file to whoever asked you.`
    : waiting
      ? `All ${total()} pairs are answered; ${waiting} votes still have to reach the server. Leave this page open, or download them.`
      : `All ${total()} pairs are answered and saved. You can close this page.`
  $('download').classList.toggle('main', !online || waiting > 0)
}

// ---- answering ----

function activate(index) {
  active = Math.max(0, Math.min(index, questions.length - 1))
  document.querySelectorAll('fieldset').forEach((each, number) => each.classList.toggle('now', number === active))
}

function answer(question, choice) {
  if (pausing) return refresh()
  const wasAnswered = isAnswered(position)
  answers[question] = choice
  const next = questions.findIndex(each => !(each in answers))
  activate(next < 0 ? questions.indexOf(question) + 1 : next)
  followFocus()
  if (next < 0) record()
  refresh()
  if (next >= 0 || wasAnswered) return
  pausing = true
  setTimeout(forward, PAUSE)
}

// Who goes through the answers with Tab is taken along.
function followFocus() {
  if (!$('questions').contains(document.activeElement)) return
  const radios = [...document.querySelectorAll('fieldset')[active].querySelectorAll('input')]
  ;(radios.find(each => each.checked) ?? radios[0]).focus({preventScroll: true})
}

function record() {
  const pair = shown(), before = answeredBy(rater).get(pair.id)
  if (before && questions.every(each => before.answers[each] === answers[each])) return
  const vote = {
    id: [...crypto.getRandomValues(new Uint8Array(16))].map(byte => byte.toString(16).padStart(2, '0')).join(''),
    comparison: data.id, rater, pair: pair.id, left: pair.left, right: pair.right, answers: {...answers},
    milliseconds: Math.round(performance.now() - began), at: Date.now(),
  }
  change(rater, own => own.votes.push(vote))
  flush()
}

function forward() {
  const inside = $('questions').contains(document.activeElement)
  const open = order.findIndex((_, index) => !isAnswered(index))
  if (position + 1 < total()) show(position + 1)
  else if (open >= 0) show(open)
  else return finish()
  if (inside) followFocus()
}

function backward() {
  if (pausing) return
  if (active > 0) return activate(active - 1)
  if (position > 0) {
    show(position - 1)
    activate(questions.length - 1)
  }
}

// ---- sending and downloading ----

const unsent = () => {
  const own = load().raters[rater] ?? {votes: [], sent: []}
  return own.votes.filter(vote => !own.sent.includes(vote.id))
}
let sending = false
let refused = ''

async function flush() {
  if (!online) return tell('kept in this browser')
  if (sending) return
  sending = true
  try {
    for (const name of Object.keys(load().raters)) await send(name)
  } finally {
    sending = false
  }
  const waiting = unsent().length
  if (refused) tell(refused, true)
  else if (waiting) {
    tell(`${waiting} ${waiting === 1 ? 'vote waits' : 'votes wait'} for the server`, true)
    setTimeout(flush, RETRY)
  } else tell(votesOf(rater).length ? 'saved' : '')
  if (!$('done').hidden) tellDone()
}

// What others voted in this browser while the server was away is sent as well.
async function send(name) {
  for (let own = memory.raters[name], left; ; own = memory.raters[name]) {
    left = own.votes.filter(vote => !own.sent.includes(vote.id))
    if (!left.length) return
    const options = {method: 'POST', headers: {'Content-Type': 'application/json'}, body: JSON.stringify(left[0])}
    const answer = await fetch('votes', options).catch(() => null)
    if (!answer || answer.status >= 500) return
    if (!answer.ok) {
      refused = `The server refused a vote: ${(await answer.json().catch(() => ({}))).error ?? answer.status}`
      return
    }
    change(name, each => each.sent.push(left[0].id))
  }
}

function tell(text, isBad = false) {
  $('saved').textContent = text
  $('saved').classList.toggle('bad', isBad)
}

function warn(text) {
  $('warning').textContent = text
  $('warning').hidden = false
}

function download() {
  const lines = votesOf(rater).map(vote => `${JSON.stringify(vote)}\n`).join('')
  const link = document.createElement('a')
  link.href = URL.createObjectURL(new Blob([lines], {type: 'application/jsonl'}))
  const name = rater.replace(/[^\p{L}\p{N}]+/gu, '-').replace(/^-|-$/g, '') || 'rater'
  link.download = `votes-${data.id.slice(0, 6)}-${name}.jsonl`
  link.click()
  URL.revokeObjectURL(link.href)
}

// ---- the pictures, large ----

let largeSide = 'left'

function enlarge(side) {
  largeSide = side
  $('large-side').textContent = CHOICES[side]
  $('large-picture').src = $(side).src
  $('large-picture').alt = $(side).alt
  $('large-picture').className = $(side).className
  if (!$('large').open) $('large').showModal()
}

// ---- keys ----

const ANSWERS = {ArrowLeft: 'left', ArrowDown: 'tie', ArrowRight: 'right', 1: 'left', 2: 'tie', 3: 'right'}

function pressed(event) {
  if (event.ctrlKey || event.metaKey || event.altKey || event.repeat) return
  if ($('large').open) {
    const side = {ArrowLeft: 'left', ArrowRight: 'right'}[event.key]
    if (side) enlarge(side)
    if (event.key.toLowerCase() === 'z') $('large').close()
    return
  }
  if ($('voting').hidden || $('keys').open) return
  const key = event.key.toLowerCase()
  if (event.key in ANSWERS) answer(questions[active], ANSWERS[event.key])
  else if (event.key === 'ArrowUp' || event.key === 'Backspace') backward()
  else if (key === 'z') enlarge('left')
  else if (key === '?') $('keys').showModal()
  else if (event.key === 'Enter' && event.target.tagName !== 'BUTTON') {
    if (!$('next').disabled && !pausing) forward()
  } else return
  event.preventDefault()
}

// ---- building the page ----

function choice(question, value) {
  const label = document.createElement('label'), radio = document.createElement('input')
  Object.assign(radio, {type: 'radio', name: question, value})
  radio.addEventListener('change', () => answer(question, value))
  label.append(radio, CHOICES[value])
  return label
}

function build() {
  $('questions').append(...questions.map((question, number) => {
    const field = document.createElement('fieldset'), legend = document.createElement('legend')
    const box = document.createElement('div')
    legend.textContent = data.questions[question]
    box.className = 'choices'
    box.append(...Object.keys(CHOICES).map(value => choice(question, value)))
    field.append(legend, box)
    field.addEventListener('focusin', () => activate(number))
    return field
  }))
  const each = data.pairs_per_rater
    ? Math.min(data.pairs_per_rater + data.checks.length, data.pairs.length) : data.pairs.length
  $('how-many').textContent = `${questions.length} questions`
  const minutes = Math.max(1, Math.round(each / 5))
  $('pairs-to-see').textContent = `${each} pairs, about ${minutes === 1 ? 'a minute' : `${minutes} minutes`}`
  for (const side of ['left', 'right']) {
    $(side).addEventListener('load', () => {
      const picture = $(side)
      picture.classList.toggle('small', picture.naturalWidth < SMALL)
      picture.parentElement.style.setProperty('--shape', `${picture.naturalWidth} / ${picture.naturalHeight}`)
    })
  }
}

function listen() {
  document.addEventListener('keydown', pressed)
  $('questions').addEventListener('submit', event => event.preventDefault())
  $('start').addEventListener('submit', event => {
    event.preventDefault()
    const name = $('name').value.normalize('NFC').replace(/\s+/g, ' ').trim()
    name ? start(name) : $('name').focus()
  })
  for (const button of document.querySelectorAll('.picture[data-side]')) {
    button.addEventListener('click', () => enlarge(button.dataset.side))
  }
  const clicks = {
    back: () => position > 0 && !pausing && show(position - 1), next: () => !pausing && forward(),
    review: () => show(total() - 1), switch: welcome, another: welcome, download, 'download-now': download,
    help: () => $('keys').showModal(), 'keys-close': () => $('keys').close(), 'large-close': () => $('large').close(),
    'large-swap': () => enlarge(largeSide === 'left' ? 'right' : 'left'),
  }
  for (const [id, work] of Object.entries(clicks)) $(id).addEventListener('click', work)
  addEventListener('online', flush)
  addEventListener('beforeunload', event => { if (!keeps && rater && votesOf(rater).length) event.preventDefault() })
}

build()
listen()
const {last, raters} = load()
last in raters && raters[last].votes.length ? start(last) : welcome()
