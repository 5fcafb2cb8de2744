"use strict";

const read = (id) => JSON.parse(document.getElementById(id)?.textContent ?? "null");

const charts = read("charts");
document.querySelectorAll(".chart").forEach((place, i) => {
  const options = { responsive: true, displaylogo: false, modeBarButtonsToRemove: ["select2d", "lasso2d"] };
  Plotly.newPlot(place, charts[i].data, charts[i].layout, options);
});

const GROUPS_A_PAGE = 24;
const gallery = read("gallery-data");

function element(tag, properties, ...children) {
  const made = Object.assign(document.createElement(tag), properties);
  made.append(...children);
  return made;
}

function describe(group) {
  const classes = Object.entries(group.classes ?? {}).map(([name, count]) => `${name} ${count}`);
  const entropy = group.entropy === undefined ? [] : [`entropy ${group.entropy.toFixed(2)}`];
  const figures = [`size ${group.size}`, `tightness ${group.tightness.toFixed(2)}`, ...entropy];
  return [figures.join(" · "), classes.join(", ")].filter(Boolean);
}

function card(group) {
  const pictures = group.images.map((image, i) =>
    element("img", { src: `data:image/webp;base64,${image}`, alt: `group ${group.group}, image ${i + 1}` }));
  const lines = describe(group).map((text) => element("div", { className: "soft" }, text));
  const hint = element("span", { className: "hint" }, pictures.length > 4 ? `all ${pictures.length}` : "");
  const button = element("button", { type: "button" },
    element("div", { className: "images" }, ...pictures), hint, `group ${group.group}`, ...lines);
  const open = (isOpen) => {
    button.setAttribute("aria-expanded", String(isOpen));
    hint.textContent = pictures.length > 4 ? (isOpen ? "fewer" : `all ${pictures.length}`) : "";
  };
  open(false);
  button.addEventListener("click", () => open(button.getAttribute("aria-expanded") === "false"));
  return element("li", {}, button);
}

if (gallery) {
  const [list, more, sort, ascending] = ["gallery", "more", "sort", "ascending"].map((id) => document.getElementById(id));
  let sorted = [];
  const showMore = () => {
    const start = list.children.length;
    list.append(...sorted.slice(start, start + GROUPS_A_PAGE).map(card));
    more.hidden = list.children.length >= sorted.length;
    return list.children[start];
  };
  const show = () => {
    const sign = ascending.checked ? 1 : -1;
    sorted = [...gallery.groups].sort((a, b) => sign * (a[sort.value] - b[sort.value]));
    list.replaceChildren();
    showMore();
  };
  sort.addEventListener("change", show);
  ascending.addEventListener("change", show);
  more.addEventListener("click", () => showMore()?.querySelector("button").focus());
  show();
}
