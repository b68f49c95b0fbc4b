'use strict';
const facts = JSON.parse(document.getElementById('facts').textContent);
const table = document.getElementById('sites'), body = table.tBodies[0], heads = [...table.tHead.rows[0].cells];
const rows = [...body.rows];
const svgNames = 'http://www.w3.org/2000/svg';

function valueOf(row, column) {
  const cell = row.cells[column];
  return cell.dataset.value === undefined ? cell.textContent : Number(cell.dataset.value);
}
function compare(a, b) {
  if (typeof a === 'string') return a.localeCompare(b, undefined, {numeric: true});
  if (Number.isNaN(a) || Number.isNaN(b)) return Number.isNaN(a) - Number.isNaN(b);
  return a < b ? -1 : a > b ? 1 : 0;
}
// The first click puts the worst first: text, number and SQNR ascend, all other columns descend.
function sortBy(column, descending) {
  closeAll();
  const order = descending ? 'descending' : 'ascending';
  heads.forEach((head, i) => head.setAttribute('aria-sort', i === column ? order : 'none'));
  const sign = descending ? -1 : 1;
  rows.sort((a, b) => sign * compare(valueOf(a, column), valueOf(b, column)));
  body.append(...rows);
}
heads.forEach((head, column) => head.firstElementChild.addEventListener('click', () => {
  const state = head.getAttribute('aria-sort');
  const isText = rows.length && typeof valueOf(rows[0], column) === 'string';
  const upwards = isText || head.dataset.key === 'sqnr' || head.dataset.key === 'number';
  sortBy(column, state === 'none' ? !upwards : state === 'ascending');
}));

const words = document.getElementById('words'), marked = document.getElementById('marked');
const kind = document.getElementById('kind'), role = document.getElementById('role');
function filter() {
  closeAll();
  const wanted = words.value.toLowerCase().split(' ').filter(Boolean);
  let shown = 0;
  for (const row of rows) {
    const text = row.textContent.toLowerCase();
    row.hidden = !((!kind.value || row.dataset.kind === kind.value) && (!role.value || row.dataset.role === role.value)
      && (!marked.checked || row.querySelector('.s1, .s2')) && wanted.every(word => text.includes(word)));
    shown += !row.hidden;
  }
  document.getElementById('shown').textContent = shown + ' of ' + rows.length + ' sites';
}
for (const control of [words, marked, kind, role]) control.addEventListener('input', filter);

function element(parent, name, attributes, text) {
  const made = document.createElementNS(svgNames, name);
  for (const key in attributes) made.setAttribute(key, attributes[key]);
  if (text !== undefined) made.textContent = text;
  parent.append(made);
  return made;
}
// Shares by exponent, on a logarithmic scale; the zones beyond the range of the format and of subnormals are coloured.
function draw(site) {
  const all = site.before.concat(site.after), width = 900, height = 220, left = 60, bottom = 34, top = 16;
  const exponents = all.map(pair => pair[0]).concat([site.emax]);
  const low = Math.min(...exponents, site.before.length ? site.least : site.emin) - 1;
  const high = Math.max(...exponents) + 2;
  const step = (width - left) / (high - low), x = e => left + (e - low) * step;
  const least = Math.log10(1 / Math.max(site.elements, 10)), span = height - top - bottom;
  const y = count => top + span * (Math.log10(count / site.elements) / (1.15 * least));
  const svg = document.createElementNS(svgNames, 'svg');
  svg.setAttribute('viewBox', [0, 0, width, height].join(' '));
  svg.setAttribute('width', width);
  svg.style.fontSize = '11px';
  const zone = (from, to, colour) => { if (to > from) element(svg, 'rect',
    {x: x(from), width: (to - from) * step, y: top, height: span, fill: colour}); };
  zone(low, Math.max(site.least, low), '#fbe3e1');
  zone(Math.max(site.least, low), Math.max(site.emin, low), '#ece6f5');
  zone(site.emax + 1, high, '#fbe3e1');
  for (let tenth = 0; tenth >= least * 1.15; tenth--) {
    const at = top + span * tenth / (1.15 * least);
    element(svg, 'line', {x1: left, x2: width, y1: at, y2: at, class: 'grid'});
    element(svg, 'text', {x: left - 6, y: at + 4, class: 'left'}, tenth === 0 ? '100 %' : '1e' + tenth);
  }
  for (const [e, count] of site.before) {
    const bar = {x: x(e) + .5, width: Math.max(step - 1, .5), y: y(count), height: top + span - y(count)};
    const made = element(svg, 'rect', {...bar, fill: site.colour, 'fill-opacity': .55});
    element(made, 'title', {}, '2^' + e + ': ' + count + ' inputs');
  }
  for (const [e, count] of site.after) element(svg, 'path', {d: 'M' + x(e) + ' ' + y(count) + 'h' + step,
    stroke: '#1a1a1a', 'stroke-width': 2});
  const every = Math.ceil((high - low) / 22);
  for (let e = low; e <= high; e++) if (e % every === 0)
    element(svg, 'text', {x: x(e) + step / 2, y: height - bottom + 15, class: 'mid'}, e);
  element(svg, 'text', {x: left, y: height - 4},
    'binary exponent; bars: inputs, black: results; violet: subnormal numbers, red: below and beyond the format');
  return svg;
}
function closeAll() { for (const open of body.querySelectorAll('tr.detail')) open.remove(); }
body.addEventListener('click', event => {
  const row = event.target.closest('tr');
  if (!row || row.classList.contains('detail')) return;
  const next = row.nextElementSibling;
  if (next && next.classList.contains('detail')) { next.remove(); return; }
  const site = facts[Number(row.id.slice(5))];
  const detail = document.createElement('tr'), cell = document.createElement('td');
  detail.className = 'detail';
  cell.colSpan = heads.length;
  const counts = Object.entries(site.counts).map(pair => pair.join(': ')).join(', ');
  const lines = [site.name, site.cast, 'elements: ' + site.elements + ', ' + counts, site.product];
  for (const line of lines.filter(Boolean)) {
    const text = document.createElement('div');
    text.textContent = line;
    cell.append(text);
  }
  cell.append(draw(site));
  detail.append(cell);
  row.after(detail);
});
filter();
