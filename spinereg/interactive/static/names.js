// The sliders of ipywidgets have no name for those who cannot see the label beside them: each is given its label's.
if (!window.spineregNames) {
    const unnamed = ".spinereg-viewer .noUi-handle:not([aria-label])"
    const name = handle => handle.setAttribute("aria-label", handle.closest(".jupyter-widgets").querySelector(".widget-label")?.textContent || "value")
    window.spineregNames = new MutationObserver(() => document.querySelectorAll(unnamed).forEach(name))
    window.spineregNames.observe(document.body, {childList: true, subtree: true})
}
