// The editor: a photo, the mask that is painted over it, and what has been removed from the photo so far.
//
// The page owns the mask and the history; what runs the model is sent the mask as a PNG and the id of a photo, and
// answers with pictures. No library, no framework: `createEditor` is all.

const UNDO_STEPS = 30;
const MARK = "rgb(255, 64, 64)";
const TOOLS = { brush: "Brush", erase: "Eraser", box: "Box", select: "Select" };
const MASK_MENU = { load: "Open a mask…", save: "Save the mask", invert: "Invert", fillHoles: "Fill its holes", clear: "Unmark everything" };
const VIEW = "Your photo. Paint over what should go. Arrow keys move, Enter paints, E erases, plus and minus zoom.";

export function createEditor(root, { onNote, onSelect }) {
  const buttons = (names, signs = {}) =>
    Object.entries(names)
      .map(([name, label]) => `<button type="button" data-do="${name}" aria-label="${label}">${signs[name] ?? label}</button>`)
      .join("");
  root.classList.add("moebius-editor");
  root.innerHTML = `
    <div class="bar" role="toolbar" aria-label="Tools">
      ${buttons(TOOLS)}
      <label>Size <input type="range" min="4" max="300" value="40" data-size aria-label="Size"></label>
      ${buttons({ undo: "Undo", redo: "Redo", zoomOut: "Zoom out", fit: "Fit", zoomIn: "Zoom in" }, { zoomOut: "−", zoomIn: "+" })}
      <details><summary>Mask</summary><div class="menu">${buttons(MASK_MENU)}</div></details>
      <input type="file" accept="image/*" hidden data-file aria-label="${MASK_MENU.load}">
    </div>
    <div class="view" tabindex="0" role="application" aria-label="${VIEW}">
      <div class="stage">
        <img class="after" alt=""><img class="old" alt="" hidden><canvas class="grown"></canvas><canvas class="mask"></canvas>
        <canvas class="draft"></canvas>
      </div>
      <div class="ring" hidden></div>
    </div>
    <div class="bar compare" hidden>
      <div class="strip history" role="group" aria-label="History"></div>
      <div class="strip candidates" role="group" aria-label="Pick one"></div>
      ${buttons({ before: "Before" })}
      <label>Compare <input type="range" min="0" max="100" value="0" data-compare aria-label="Compare"></label>
    </div>`;
  const find = (selector) => root.querySelector(selector);
  const view = find(".view");
  const stage = find(".stage");
  const ring = find(".ring");
  const [after, old] = [find(".after"), find(".old")];
  const hold = find("[data-do=before]");
  const [grownCanvas, maskCanvas, draftCanvas] = [find(".grown"), find(".mask"), find(".draft")];
  const [mask, draft] = [maskCanvas, draftCanvas].map((c) => c.getContext("2d", { willReadFrequently: true }));

  let [width, height] = [0, 0];
  let versions = []; // {candidates: [{id, url}], picked}: the photo as it came, then what each removal left of it
  let current = 0;
  let tool = "brush";
  let size = 40;
  let [zoom, left, top] = [1, 0, 0]; // of the stage in the view
  let [undone, done] = [[], []]; // alpha planes of the mask
  let margins = null; // by how many pixels of the photo the mask grows, and the box around it that the model sees
  let scale = 1; // pixels of the view for one of the photo
  let busy = false;
  let hint = "";

  const shown = (k = current) => versions[k]?.candidates[versions[k].picked];

  // --- the mask

  const plane = () => {
    const { data } = mask.getImageData(0, 0, width, height);
    return new Uint8Array(width * height).map((_, i) => (data[4 * i + 3] >= 128 ? 255 : 0));
  };
  const setPlane = (alpha) => {
    const image = mask.createImageData(width, height);
    const pixels = new Uint32Array(image.data.buffer);
    alpha.forEach((value, i) => (pixels[i] = value ? 0xff4040ff : 0));
    mask.putImageData(image, 0, 0);
  };
  const share = () => plane().reduce((sum, value) => sum + value, 0) / (255 * width * height);
  const remember = () => {
    done.push(plane());
    done.splice(0, done.length - UNDO_STEPS);
    undone = [];
  };
  const changed = () => {
    const percent = 100 * share();
    drawGrown();
    onNote(percent ? `Marked: ${percent < 1 ? "<1" : Math.round(percent)} % of the photo.` : "Nothing is marked.");
    update();
  };
  const edit = (change) => {
    remember();
    const alpha = plane();
    setPlane(change(alpha) ?? alpha);
    changed();
  };

  // What nothing outside reaches, going from pixel to pixel, becomes a part of the mask.
  const withoutHoles = (alpha) => {
    const outside = new Uint8Array(alpha.length);
    const stack = [];
    const visit = (i) => {
      if (!alpha[i] && !outside[i]) {
        outside[i] = 1;
        stack.push(i);
      }
    };
    for (let x = 0; x < width; x++) [x, (height - 1) * width + x].forEach(visit);
    for (let y = 0; y < height; y++) [y * width, (y + 1) * width - 1].forEach(visit);
    while (stack.length) {
      const i = stack.pop();
      if (i % width) visit(i - 1);
      if ((i + 1) % width) visit(i + 1);
      if (i >= width) visit(i - width);
      if (i < alpha.length - width) visit(i + width);
    }
    return outside.map((value) => (value ? 0 : 255));
  };

  const newCanvas = () => {
    const canvas = Object.assign(document.createElement("canvas"), { width, height });
    return { canvas, context: canvas.getContext("2d") };
  };
  // An opaque picture is a mask by its brightness, any other by its alpha.
  const planeOf = (picture) => {
    const { context } = newCanvas();
    context.drawImage(picture, 0, 0, width, height);
    const { data } = context.getImageData(0, 0, width, height);
    const isOpaque = data.every((value, i) => i % 4 < 3 || value === 255);
    const brightness = (i) => 0.299 * data[i] + 0.587 * data[i + 1] + 0.114 * data[i + 2];
    const value = isOpaque ? brightness : (i) => data[i + 3];
    return new Uint8Array(width * height).map((_, i) => (value(4 * i) >= 128 ? 255 : 0));
  };
  const load = async (file) => {
    const picture = await createImageBitmap(file);
    if (Math.abs((picture.width * height) / (picture.height * width) - 1) > 0.02)
      return onNote(`This mask has another shape than the photo, which is ${width}×${height} pixels here.`);
    edit(() => planeOf(picture));
  };
  const save = () => {
    const { canvas, context } = newCanvas();
    const image = context.createImageData(width, height);
    plane().forEach((value, i) => image.data.set([value, value, value, 255], 4 * i));
    context.putImageData(image, 0, 0);
    Object.assign(document.createElement("a"), { download: "mask.png", href: canvas.toDataURL("image/png") }).click();
  };

  // What growing the mask adds, and the box that the model sees, are drawn while they are set.
  const drawGrown = () => {
    const context = grownCanvas.getContext("2d");
    context.clearRect(0, 0, width, height);
    if (!margins) return;
    const grow = Math.round(margins.grow * scale);
    context.drawImage(maskCanvas, 0, 0);
    for (const [dx, dy] of [[1, 0], [0, 1]])
      for (let reach = 0; reach < grow; ) {
        const step = Math.min(Math.max(reach, 1), grow - reach);
        for (const sign of [1, -1]) context.drawImage(grownCanvas, sign * step * dx, sign * step * dy);
        reach += step;
      }
    let [x0, y0, x1, y1] = [width, height, -1, -1];
    plane().forEach((value, i) => {
      if (!value) return;
      const [x, y] = [i % width, Math.floor(i / width)];
      [x0, y0, x1, y1] = [Math.min(x0, x), Math.min(y0, y), Math.max(x1, x), Math.max(y1, y)];
    });
    if (x1 < 0) return;
    const margin = grow + Math.max(margins.least * scale, (margins.percent / 100) * Math.max(x1 - x0 + 1, y1 - y0 + 1));
    Object.assign(context, { lineWidth: 2, strokeStyle: "#fff" });
    context.setLineDash([8, 6]);
    context.strokeRect(x0 - margin, y0 - margin, x1 - x0 + 2 * margin, y1 - y0 + 2 * margin);
  };

  // --- what is seen

  const place = () => {
    stage.style.transform = `translate(${left}px, ${top}px) scale(${zoom})`;
    ring.style.width = ring.style.height = `${size * zoom}px`;
    find("[data-do=fit]").textContent = `${Math.round(100 * zoom)} %`;
  };
  const fitZoom = () => Math.min(view.clientWidth / width, view.clientHeight / height) || 1;
  const fit = () => {
    if (!width || !view.clientWidth) return;
    view.style.maxHeight = `${Math.max(200, (view.clientWidth * height) / width)}px`; // no empty place on a phone
    zoom = fitZoom();
    left = (view.clientWidth - zoom * width) / 2;
    top = (view.clientHeight - zoom * height) / 2;
    place();
  };
  const zoomAt = (factor, x = view.clientWidth / 2, y = view.clientHeight / 2) => {
    const next = Math.min(Math.max(zoom * factor, Math.min(fitZoom(), 1)), 16);
    left = x - ((x - left) * next) / zoom;
    top = y - ((y - top) * next) / zoom;
    zoom = next;
    place();
  };
  new ResizeObserver(fit).observe(view);

  const thumb = (url, label, pressed, act) => {
    const element = Object.assign(document.createElement("button"), { type: "button", title: label, ariaPressed: pressed });
    element.append(Object.assign(document.createElement("img"), { src: url, alt: label }));
    element.addEventListener("click", act);
    return element;
  };
  const update = () => {
    for (const name of Object.keys(TOOLS)) find(`[data-do=${name}]`).setAttribute("aria-pressed", tool === name);
    find("[data-do=undo]").disabled = busy || (!done.length && !current);
    find("[data-do=redo]").disabled = busy || (!undone.length && current >= versions.length - 1);
    find(".compare").hidden = versions.length < 2;
    for (const element of [hold, find("[data-compare]")]) element.disabled = !current;
    root.toggleAttribute("data-busy", busy);
  };
  const show = () => {
    const version = versions[current];
    after.src = shown().url;
    if (current) old.src = shown(current - 1).url;
    compare(0);
    find(".history").replaceChildren(
      ...versions.map((_, k) => thumb(shown(k).url, k ? `Removal ${k}` : "Original", k === current, () => go(k))),
    );
    find(".candidates").replaceChildren(
      ...(version.candidates.length < 2 ? [] : version.candidates).map(({ url }, k) =>
        thumb(url, `Candidate ${k + 1}`, k === version.picked, () => {
          version.picked = k;
          versions.length = current + 1; // what was removed from another candidate is not in this one
          show();
        }),
      ),
    );
    update();
  };
  const go = (k) => {
    if (busy || k < 0 || k >= versions.length) return;
    current = k;
    forget();
    show();
  };
  const forget = () => {
    [done, undone] = [[], []];
    mask.clearRect(0, 0, width, height);
    draft.clearRect(0, 0, width, height);
    drawGrown();
  };
  const compare = (percent) => {
    find("[data-compare]").value = percent;
    old.hidden = !percent;
    old.style.clipPath = `inset(0 ${100 - percent}% 0 0)`;
    maskCanvas.hidden = grownCanvas.hidden = percent > 0;
  };

  // --- actions of the toolbar

  const undo = () => {
    if (!done.length) return go(current - 1);
    undone.push(plane());
    setPlane(done.pop());
    changed();
  };
  const redo = () => {
    if (!undone.length) return go(current + 1);
    done.push(plane());
    setPlane(undone.pop());
    changed();
  };
  const choose = (name) => {
    tool = name;
    if (name === "select" && hint) onNote(hint);
    update();
  };
  const setSize = (value) => {
    size = Math.min(Math.max(value, 4), 300);
    find("[data-size]").value = size;
    place();
  };
  const actions = {
    ...Object.fromEntries(Object.keys(TOOLS).map((name) => [name, () => choose(name)])),
    undo,
    redo,
    fit,
    zoomIn: () => zoomAt(1.25),
    zoomOut: () => zoomAt(0.8),
    load: () => find("[data-file]").click(),
    save,
    invert: () => edit((alpha) => alpha.map((value) => 255 - value)),
    fillHoles: () => edit(withoutHoles),
    clear: () => edit((alpha) => alpha.fill(0)),
  };
  root.addEventListener("click", (event) => {
    const name = event.target.closest("[data-do]")?.dataset.do;
    if (!width || busy || !actions[name]) return;
    actions[name]();
    event.target.closest("details")?.removeAttribute("open");
  });
  find("[data-file]").addEventListener("change", (event) => {
    if (event.target.files.length) load(event.target.files[0]).catch((error) => onNote(String(error.message ?? error)));
    event.target.value = "";
  });
  find("[data-size]").addEventListener("input", (event) => setSize(Number(event.target.value)));
  find("[data-compare]").addEventListener("input", (event) => compare(Number(event.target.value)));
  for (const type of ["pointerdown", "keydown"])
    hold.addEventListener(type, (event) => (!event.key || " Enter".includes(event.key)) && compare(100));
  for (const type of ["pointerup", "pointerleave", "keyup", "blur"]) hold.addEventListener(type, () => compare(0));

  // --- painting

  const pointers = new Map(); // fingers, pens and mice that are down: where in the view
  let stroke = null; // {kind, from, points}
  let cursor = null; // of the keyboard, in pixels of the photo
  let corner = null; // of a box that the keyboard began

  const inPhoto = ({ clientX, clientY }) => {
    const box = stage.getBoundingClientRect();
    return [((clientX - box.left) / box.width) * width, ((clientY - box.top) / box.height) * height];
  };
  const inView = ({ clientX, clientY }) => {
    const box = view.getBoundingClientRect();
    return [clientX - box.left, clientY - box.top];
  };
  const line = (context, [x0, y0], [x1, y1], erase) => {
    const globalCompositeOperation = erase ? "destination-out" : "source-over";
    Object.assign(context, { globalCompositeOperation, strokeStyle: MARK, lineWidth: size, lineCap: "round" });
    context.beginPath();
    context.moveTo(x0, y0);
    context.lineTo(x1 + 0.01, y1);
    context.stroke();
  };
  const rectangle = (context, [x0, y0], [x1, y1], erase) => {
    Object.assign(context, { globalCompositeOperation: erase ? "destination-out" : "source-over", fillStyle: MARK });
    context.fillRect(...[x0, y0, x1 - x0, y1 - y0].map(Math.round));
  };
  const begin = (point, erase) => {
    compare(0);
    stroke = { kind: tool === "erase" ? "brush" : tool, erase: erase || tool === "erase", from: point, last: point };
    if (stroke.kind === "brush") {
      remember();
      line(mask, point, point, stroke.erase);
    }
  };
  const move = (point) => {
    if (stroke.kind === "brush") line(mask, stroke.last, point, stroke.erase);
    if (stroke.kind === "select") line(draft, stroke.last, point, false);
    if (stroke.kind === "box") {
      draft.clearRect(0, 0, width, height);
      rectangle(draft, stroke.from, point, false);
    }
    stroke.last = point;
  };
  const end = () => {
    const { kind, erase, from, last } = stroke;
    stroke = null;
    if (kind === "select") {
      const isClick = Math.hypot(last[0] - from[0], last[1] - from[1]) < 4 / zoom;
      const scribble = isClick ? null : draftCanvas.toDataURL("image/png");
      onNote("Looking for what is there…");
      return onSelect({ photo: shown().id, point: from, scribble, erase });
    }
    draft.clearRect(0, 0, width, height);
    if (kind === "box") {
      remember();
      rectangle(mask, from, last, erase);
    }
    changed();
  };
  const cancel = () => {
    if (stroke?.kind === "brush") setPlane(done.pop());
    stroke = null;
    draft.clearRect(0, 0, width, height);
  };

  view.addEventListener("contextmenu", (event) => event.preventDefault());
  view.addEventListener("pointerdown", (event) => {
    if (!width || busy) return;
    view.setPointerCapture(event.pointerId);
    pointers.set(event.pointerId, inView(event));
    if (pointers.size === 2) return cancel(); // two fingers move the photo
    // The middle button moves the photo, the right one and a pen's other end erase.
    if (pointers.size > 1 || event.button === 1) return;
    begin(inPhoto(event), Boolean(event.buttons & 34) || (tool === "select" && event.shiftKey));
  });
  view.addEventListener("pointermove", (event) => {
    const [x, y] = inView(event);
    ring.hidden = event.pointerType === "touch" || tool === "box" || !width;
    Object.assign(ring.style, { left: `${x}px`, top: `${y}px` });
    const before = pointers.get(event.pointerId);
    if (!before) return;
    if (pointers.size === 2) {
      const [other] = [...pointers].filter(([id]) => id !== event.pointerId).map(([, point]) => point);
      const distance = ([px, py]) => Math.max(Math.hypot(px - other[0], py - other[1]), 1);
      left += (x - before[0]) / 2;
      top += (y - before[1]) / 2;
      zoomAt(distance([x, y]) / distance(before), (x + other[0]) / 2, (y + other[1]) / 2);
    } else if (stroke) {
      for (const each of event.getCoalescedEvents?.() ?? [event]) move(inPhoto(each));
      if (event.type) move(inPhoto(event));
    } else if (event.buttons & 4) {
      left += x - before[0];
      top += y - before[1];
      place();
    }
    pointers.set(event.pointerId, [x, y]);
  });
  for (const type of ["pointerup", "pointercancel"])
    view.addEventListener(type, (event) => {
      pointers.delete(event.pointerId);
      if (stroke) type === "pointerup" ? end() : cancel();
    });
  view.addEventListener("pointerleave", () => (ring.hidden = true));
  view.addEventListener(
    "wheel",
    (event) => {
      if (!width || (event.deltaY > 0 && zoom <= fitZoom() && !event.ctrlKey)) return; // the page scrolls on
      event.preventDefault();
      zoomAt(Math.exp(-event.deltaY * (event.ctrlKey ? 0.01 : 0.002)), ...inView(event));
    },
    { passive: false },
  );

  const keys = {
    "+": () => zoomAt(1.25),
    "-": () => zoomAt(0.8),
    0: fit,
    "[": () => setSize(size / 1.2),
    "]": () => setSize(size * 1.2),
    b: () => choose("brush"),
    e: () => choose("erase"),
    r: () => choose("box"),
    Escape: () => {
      corner = null;
      cancel();
    },
  };
  view.addEventListener("keydown", (event) => {
    if (!width || busy || event.altKey) return;
    const arrow = { ArrowLeft: [-1, 0], ArrowRight: [1, 0], ArrowUp: [0, -1], ArrowDown: [0, 1] }[event.key];
    if (arrow) {
      const step = event.shiftKey ? 1 : Math.max(8, Math.round(size / 3));
      cursor ??= [width / 2, height / 2];
      cursor = cursor.map((value, axis) => Math.min(Math.max(value + step * arrow[axis], 0), axis ? height : width));
      ring.hidden = false;
      Object.assign(ring.style, { left: `${left + zoom * cursor[0]}px`, top: `${top + zoom * cursor[1]}px` });
      if (corner) {
        draft.clearRect(0, 0, width, height);
        rectangle(draft, corner, cursor, false);
      }
    } else if (event.key === "Enter" || event.key === " ") {
      cursor ??= [width / 2, height / 2];
      if (tool === "box" && !corner) corner = cursor;
      else {
        begin(corner ?? cursor, event.shiftKey);
        move(cursor);
        end();
        corner = null;
      }
    } else if (!event.ctrlKey && !event.metaKey && keys[event.key]) keys[event.key]();
    else return;
    event.preventDefault();
  });
  root.ownerDocument.addEventListener("keydown", (event) => {
    if (!root.isConnected || !width || busy || !(event.ctrlKey || event.metaKey)) return;
    if (event.target.closest?.("input:not([type=range]), textarea")) return;
    const act = { z: event.shiftKey ? redo : undo, y: redo }[event.key.toLowerCase()];
    if (!act) return;
    act();
    event.preventDefault();
  });

  update();
  const setBusy = (value) => {
    busy = value;
    cancel();
    if (!busy && versions.length) after.src = shown().url;
    update();
  };
  // What the page tells the editor to do, and what it asks.
  return {
    // Begins with a photo {id, url, width}, the size in which it is viewed, what to say when Select is chosen, and
    // perhaps a mask.
    async open({ photo, size: viewed, hint: text, mask: url }) {
      [width, height] = viewed;
      hint = text;
      scale = width / photo.width;
      for (const canvas of [grownCanvas, maskCanvas, draftCanvas]) Object.assign(canvas, { width, height });
      Object.assign(stage.style, { width: `${width}px`, height: `${height}px` });
      versions = [{ candidates: [photo], picked: 0 }];
      current = 0;
      cursor = corner = null;
      forget();
      setSize(Math.round(Math.max(width, height) / 20));
      show();
      fit();
      await this.add({ mask: url });
    },
    close() {
      versions = [];
      [width, height] = [0, 0];
      update();
    },
    // Nothing can be painted while the model runs.
    busy: () => setBusy(true),
    idle: () => setBusy(false),
    preview: ({ url }) => (after.src = url),
    // A finished removal, as one or more candidates {id, url}.
    finish({ candidates }) {
      setBusy(false);
      versions.length = current + 1;
      versions.push({ candidates, picked: 0 });
      go(current + 1);
    },
    // A region that was selected joins the mask or leaves it.
    async add({ mask: url, erase }) {
      draft.clearRect(0, 0, width, height);
      if (!url) return;
      const picture = Object.assign(new Image(), { src: url });
      await picture.decode();
      const region = planeOf(picture);
      edit((alpha) => alpha.map((value, i) => (region[i] ? (erase ? 0 : 255) : value)));
    },
    // What the fields of the page say: pixels of the photo, or nothing, and percent. Rims are found later.
    setMargins(grow, percent, least) {
      margins = { grow: Math.min(Number(grow) || 0, 200), percent, least };
      drawGrown();
    },
    get marked() {
      return { photo: shown()?.id, mask: width && share() ? maskCanvas.toDataURL("image/png") : null };
    },
  };
}
