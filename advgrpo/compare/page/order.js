'use strict'

// Which pairs a rater sees, in which order, and which picture stands left: drawn from the comparison's id and the rater's
// name alone, so that a reload, or another device, gives the same.

// FNV-1a over UTF-16 code units.
function hash(text) {
  let value = 0x811c9dc5
  for (let i = 0; i < text.length; i++) value = Math.imul(value ^ text.charCodeAt(i), 0x01000193)
  return value >>> 0
}

// mulberry32: numbers in [0, 1) from a 32-bit seed.
function randomFrom(text) {
  let state = hash(text)
  return () => {
    state = (state + 0x6d2b79f5) | 0
    let t = Math.imul(state ^ (state >>> 15), state | 1)
    t ^= t + Math.imul(t ^ (t >>> 7), t | 61)
    return ((t ^ (t >>> 14)) >>> 0) / 4294967296
  }
}

function shuffled(list, random) {
  const result = [...list]
  for (let i = result.length - 1; i > 0; i--) {
    const j = Math.floor(random() * (i + 1))
    ;[result[i], result[j]] = [result[j], result[i]]
  }
  return result
}

// [{id, prompt, left, right}] for one rater: a share of the pairs, all checks among them.
function pairsFor(data, rater) {
  const random = randomFrom(`${data.id}:${rater}`)
  const checks = new Set(data.checks)
  const own = shuffled(data.pairs.filter(pair => !checks.has(pair.id)), random)
  const shown = data.pairs_per_rater ? own.slice(0, data.pairs_per_rater) : own
  return shuffled([...shown, ...data.pairs.filter(pair => checks.has(pair.id))], random).map(pair => {
    const turned = randomFrom(`${data.id}:${rater}:${pair.id}`)() < 0.5
    const [left, right] = turned ? [...pair.pictures].reverse() : pair.pictures
    return {id: pair.id, prompt: data.prompts[pair.prompt], left, right}
  })
}
