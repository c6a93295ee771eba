// Fetch this page again and swap its live part. Without JavaScript, the page reloads itself instead.
const live = document.getElementById("live")
let shown = live.innerHTML

async function refresh() {
  try {
    const page = document.hidden ? "" : await (await fetch(location.href, {cache: "no-store"})).text()
    const fresh = new DOMParser().parseFromString(page, "text/html").getElementById("live")
    if (fresh && fresh.innerHTML !== shown) {
      shown = fresh.innerHTML
      swap(fresh)
    }
  } catch { /* The server is away for a moment. */ }
  setTimeout(refresh, document.querySelector("[data-live]") ? 400 : 2000)
}

function swap(fresh) {
  const focused = live.contains(document.activeElement) && document.activeElement.getAttribute("href")
  const old = new Map([...live.querySelectorAll("progress")].map(bar => [bar.id, bar]))
  live.toggleAttribute("data-live", fresh.hasAttribute("data-live"))
  live.innerHTML = fresh.innerHTML
  for (const bar of live.querySelectorAll("progress")) {
    if (old.has(bar.id)) {  // keep the element, so that its bar glides
      const value = bar.value
      bar.replaceWith(old.get(bar.id))
      requestAnimationFrame(() => { old.get(bar.id).value = value })
    }
  }
  if (focused) live.querySelector(`a[href="${focused}"]`)?.focus()
}

const form = document.querySelector("form")

form?.addEventListener("submit", () => {
  for (const button of form.querySelectorAll("button")) button.disabled = true
  form.querySelector("button").textContent = "Uploading…"
})

// The sample, its orders as many times over as the button says, as if it had been chosen by hand.
form?.addEventListener("click", async event => {
  const times = Number(event.target.dataset.times)
  if (!times) return
  const [header, ...orders] = (await (await fetch("/static/sample.csv")).text()).split(/^/m)
  const file = new File([header, ...Array(times).fill(orders.join(""))], `orders-x${times}.csv`, {type: "text/csv"})
  const chosen = new DataTransfer()
  chosen.items.add(file)
  form.elements.files.files = chosen.files
  form.requestSubmit()
})

addEventListener("pageshow", event => event.persisted ? location.reload() : refresh())
