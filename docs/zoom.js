// A click on a figure shows it as large as the window; a click, Escape or Enter closes it.
document.addEventListener("DOMContentLoaded", () => {
  const dialog = Object.assign(document.createElement("dialog"), { className: "zoom" });
  const large = dialog.appendChild(document.createElement("img"));
  document.body.append(dialog);
  dialog.onclick = () => dialog.close();
  dialog.onkeydown = (e) => e.key === "Escape" && dialog.close();    // Sphinx takes Escape for itself
  for (const img of document.querySelectorAll(".cell_output img")) {
    const open = () => { large.src = img.src; large.alt = img.alt; dialog.showModal(); };
    Object.assign(img, { onclick: open, tabIndex: 0, onkeydown: (e) => e.key === "Enter" && open() });
  }
});
