// Fetch this page again and swap its live part. Without JavaScript, the page reloads itself instead.
const live = document.getElementById("live")
const away = document.getElementById("away")
let shown = live.innerHTML

async function refresh() {
  try {
    const page = document.hidden ? "" : await (await fetch(location.href, {cache: "no-store"})).text()
    const fresh = new DOMParser().parseFromString(page, "text/html").getElementById("live")
    away.hidden ||= Boolean(fresh)
    if (fresh && fresh.innerHTML !== shown) {
      shown = fresh.innerHTML
      swap(fresh)
    }
    tellPace()
  } catch {
    away.hidden = false
  }
  setTimeout(refresh, document.querySelector("[data-live]") ? 400 : 2000)
}

function swap(fresh) {
  const focused = live.contains(document.activeElement) && (document.activeElement.id || document.activeElement.getAttribute("href"))
  const old = new Map([...live.querySelectorAll("progress")].map(bar => [bar.id, bar]))
  live.toggleAttribute("data-live", fresh.hasAttribute("data-live"))
  live.innerHTML = fresh.innerHTML
  for (const bar of live.querySelectorAll("progress")) {
    if (old.has(bar.id)) {  // keep the element, so that its bar glides
      const {max, value} = bar
      bar.replaceWith(old.get(bar.id))
      requestAnimationFrame(() => Object.assign(old.get(bar.id), {max, value}))
    }
  }
  if (focused) live.querySelector(`[id="${focused}"], a[href="${focused}"]`)?.focus()
}

// How fast each file is, and how long it will take: by what this page has seen of it in the last ten seconds.
const paces = new Map()

function tellPace() {
  const now = performance.now() / 1000
  for (const bar of live.querySelectorAll("progress")) {
    const seen = [...paces.get(bar.id) ?? [], {now, done: bar.value}].filter(each => each.now > now - 10)
    paces.set(bar.id, seen)
    const rate = (bar.value - seen[0].done) / (now - seen[0].now)
    if (!(rate > 0)) continue
    const left = (bar.max - bar.value) / rate
    bar.parentElement.querySelector(".pace").textContent =
      ` · ${Math.round(rate).toLocaleString("en")}\xa0lines/s · ${left < 90 ? Math.ceil(left) + "\xa0s" : Math.ceil(left / 60) + "\xa0min"}\xa0left`
  }
}

live.addEventListener("click", event => {
  if (event.target.id !== "kill") return
  away.hidden = false
  fetch("/kill", {method: "POST"}).catch(() => { /* That was the wish. */ })
})

const form = document.querySelector("form")

form?.addEventListener("submit", () => {
  for (const button of form.querySelectorAll("button")) button.disabled = true
  form.querySelector("button").textContent = "Uploading…"
})

// The sample, as many times over as the button says, as if it had been chosen by hand. Its orders get new numbers.
form?.addEventListener("click", async event => {
  const times = Number(event.target.dataset.times)
  if (!times) return
  const [header, ...orders] = (await (await fetch("/static/sample.csv")).text()).split(/^/m)
  const copy = (_, number) => orders.join("").replaceAll("SO-", `SO-${Date.now().toString(36)}-${number}-`)
  const file = new File([header, ...Array.from({length: times}, copy)], `orders-x${times}.csv`, {type: "text/csv"})
  const chosen = new DataTransfer()
  chosen.items.add(file)
  form.elements.files.files = chosen.files
  form.requestSubmit()
})

addEventListener("pageshow", event => event.persisted ? location.reload() : refresh())
