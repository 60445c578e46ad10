// what the theme leaves out for keyboards and screen readers
document.addEventListener("DOMContentLoaded", () => {
  const all = (selector, change) => document.querySelectorAll(selector).forEach(change)
  const scrolling = () => all("pre, .cell_output .output, .table-wrapper", box => { if (box.scrollWidth > box.clientWidth) box.tabIndex = 0 })
  all(".caption[role=heading]", caption => caption.setAttribute("aria-level", 2))
  all("details.hide > summary", summary => summary.removeAttribute("aria-label"))
  all("aside.toc-drawer", drawer => drawer.setAttribute("aria-label", "On this page"))
  scrolling()
  addEventListener("resize", scrolling)
  all("details", fold => fold.addEventListener("toggle", scrolling))
})
