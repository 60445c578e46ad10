// A frame with itk-vtk-viewer, which this very JupyterLab serves, filled with the model's volumes: an anywidget.
// Whatever goes wrong is reported in the model's trait `failed`.

async function fill(page, model) {
  if (!page.itkVtkViewer) throw new Error("this JupyterLab does not serve itk-vtk-viewer");
  const image = ({ bytes, ...about }) => {
    const own = page.Uint8Array.from(new Uint8Array(bytes.buffer, bytes.byteOffset, bytes.byteLength));
    const data = about.imageType.componentType === "float32" ? new page.Float32Array(own.buffer) : own;
    return { ...about, direction: page.Float64Array.from(about.direction), data };
  };
  const [first, second] = model.get("volumes").map(image);
  const viewer = await page.itkVtkViewer.createViewer(page.document.querySelector("div"), { image: first, labelImage: second, rotate: false });
  if (second) viewer.setLabelImageLabelNames(new page.Map(model.get("names").map((name, k) => [k + 1, name])));
}

function render({ model, el }) {
  const { fullLabextensionsUrl } = JSON.parse(document.getElementById("jupyter-config-data")?.textContent ?? "{}");
  const frame = document.createElement("iframe");
  const fail = (why) => { model.set("failed", String(why)); model.save_changes(); };
  const late = setTimeout(() => fail("no answer within 5 seconds"), 5000);
  frame.onload = () => {  // moved within the page, a frame loads again
    clearTimeout(late);
    const page = frame.contentWindow;
    fill(page, model).catch((error) => page === frame.contentWindow && fail(error));
  };
  frame.style = "width: 100%; height: 600px; border: 0";
  frame.srcdoc = `<div style="position: absolute; inset: 0"></div><script src="${fullLabextensionsUrl}/itk-vtk-viewer/itkVtkViewer.js"></script>`;
  el.replaceChildren(frame);
}

export default { render };
