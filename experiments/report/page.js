// Draws the page's figures one after the other, so that it can be read and scrolled from the first moment.
(() => {
  const PHONE = 700, PRINT = 690; // CSS pixels: narrower is a phone; the text width of A4
  const boxes = [...document.querySelectorAll(".plot")];
  const read = (box) => JSON.parse(document.getElementById(box.dataset.figure).textContent);

  function draw(box) {
    if (box.dataset.drawn) return;
    box.dataset.drawn = "yes";
    const { data, layout, phone } = read(box);
    const narrow = window.innerWidth < PHONE;
    const shown = { ...layout, ...(narrow ? { dragmode: false, ...phone } : {}) }; // a finger scrolls, it does not zoom
    box.style.height = shown.height + "px";
    return Plotly.newPlot(box, data, shown, { displayModeBar: false, responsive: true, displaylogo: false });
  }

  async function drawAll() {
    for (const box of boxes) {
      await new Promise((resume) => setTimeout(resume));
      await draw(box);
    }
    document.documentElement.dataset.figures = "drawn";
  }

  const columns = (box) => (box.closest(".panels") ? 3 : 1);
  window.addEventListener("beforeprint", () => {
    document.querySelectorAll("details:not([open])").forEach((part) => {
      part.open = true;
      part.dataset.opened = "for print";
    });
    for (const box of boxes) {
      draw(box);
      Plotly.relayout(box, { width: Math.floor(PRINT / columns(box)) - (columns(box) > 1 ? 12 : 0) });
    }
  });
  window.addEventListener("afterprint", () => {
    document.querySelectorAll("details[data-opened]").forEach((part) => {
      part.open = false;
      delete part.dataset.opened;
    });
    for (const box of boxes) Plotly.relayout(box, { width: null, autosize: true });
  });
  drawAll();
})();
