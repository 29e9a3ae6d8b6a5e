/** The picture on the page: a photo, the mask painted on it, and results beside the original. */

import type { Patch } from './pipeline';
import type { Mask } from './region';

const TINT = '#ff0f6b';

type Point = { x: number; y: number };
type Mark = { erase: boolean; size: number; points: Point[] } | { picture: HTMLCanvasElement };

export function makeCanvas(width: number, height: number): [HTMLCanvasElement, CanvasRenderingContext2D] {
  const canvas = document.createElement('canvas');
  canvas.width = width;
  canvas.height = height;
  return [canvas, canvas.getContext('2d', { willReadFrequently: true })!];
}

export class Editor {
  /** Width of the brush in pixels of the screen. */
  size = 30;
  isErasing = false;
  private photo: HTMLCanvasElement | null = null;
  private mask!: HTMLCanvasElement;
  private maskContext!: CanvasRenderingContext2D;
  private marks: Mark[] = [];
  private result: { canvas: HTMLCanvasElement; left: number; top: number } | null = null;
  private split = 0;
  private scale = 1;
  private offset: Point = { x: 0, y: 0 };
  private cursor: Point | null = null;
  private pointers = new Map<number, Point>();
  private stroke: Extract<Mark, { points: Point[] }> | null = null;
  private isPending = false;

  /** @param onChange is called when marks come or go. */
  constructor(
    private readonly canvas: HTMLCanvasElement,
    private readonly onChange: () => void,
  ) {
    new ResizeObserver(() => this.fit()).observe(canvas);
    canvas.addEventListener('pointerdown', (event) => this.press(event));
    canvas.addEventListener('pointermove', (event) => this.drag(event));
    for (const name of ['pointerup', 'pointercancel'] as const)
      canvas.addEventListener(name, (event) => this.release(event));
    canvas.addEventListener('pointerleave', () => {
      this.cursor = null;
      this.draw();
    });
    canvas.addEventListener('contextmenu', (event) => event.preventDefault());
    canvas.addEventListener(
      'wheel',
      (event) => {
        event.preventDefault();
        this.zoom(Math.exp(-event.deltaY / (event.deltaMode ? 20 : 400)), this.place(event));
      },
      { passive: false },
    );
    canvas.addEventListener('keydown', (event) => this.type(event));
  }

  get width(): number {
    return this.photo!.width;
  }

  get height(): number {
    return this.photo!.height;
  }

  open(photo: HTMLCanvasElement): void {
    this.photo = photo;
    [this.mask, this.maskContext] = makeCanvas(photo.width, photo.height);
    this.marks = [];
    this.result = null;
    this.fit();
    this.onChange();
  }

  close(): void {
    this.photo = this.result = null;
    this.marks = [];
  }

  pixels(): Uint8ClampedArray<ArrayBuffer> {
    return this.photo!.getContext('2d')!.getImageData(0, 0, this.width, this.height).data;
  }

  /** What is marked; a pixel that a stroke covers by half is. */
  readMask(): Mask {
    const { data } = this.maskContext.getImageData(0, 0, this.width, this.height);
    const mask = new Uint8Array(data.length / 4);
    for (let i = 0; i < mask.length; i++) mask[i] = data[4 * i + 3] >= 128 ? 1 : 0;
    return { data: mask, height: this.height, width: this.width };
  }

  /** The mask as a picture: white is filled. */
  drawMask(): HTMLCanvasElement {
    const [canvas, context] = makeCanvas(this.width, this.height);
    const image = context.createImageData(this.width, this.height);
    this.readMask().data.forEach((value, i) => image.data.set([255 * value, 255 * value, 255 * value, 255], 4 * i));
    context.putImageData(image, 0, 0);
    return canvas;
  }

  hasMarks(): boolean {
    return this.marks.length > 0;
  }

  undo(): void {
    this.marks.pop();
    this.repaint();
  }

  clear(): void {
    this.marks = [];
    this.repaint();
  }

  /** Marks what is white in a picture, or opaque if it is transparent somewhere. False if its shape is another. */
  importMask(picture: ImageBitmap): boolean {
    const [canvas, context] = makeCanvas(this.width, this.height);
    if (Math.abs(picture.width * this.height - picture.height * this.width) > Math.max(this.width, this.height))
      return false;
    context.imageSmoothingEnabled = false;
    context.drawImage(picture, 0, 0, this.width, this.height);
    const image = context.getImageData(0, 0, this.width, this.height);
    const { data } = image;
    let isOpaque = true;
    for (let i = 3; i < data.length && isOpaque; i += 4) isOpaque = data[i] === 255;
    for (let i = 0; i < data.length; i += 4) {
      const value = isOpaque ? 0.299 * data[i] + 0.587 * data[i + 1] + 0.114 * data[i + 2] : data[i + 3];
      data.set([255, 15, 107, value >= 127.5 ? 255 : 0], i);
    }
    context.putImageData(image, 0, 0);
    this.addMark({ picture: canvas });
    return true;
  }

  /** Shows a result, or the marks again. */
  show(patch: Patch | null): void {
    this.result = null;
    if (patch) {
      const [left, top, right] = patch.box;
      const [canvas, context] = makeCanvas(right - left, patch.pixels.length / 4 / (right - left));
      context.putImageData(new ImageData(patch.pixels, canvas.width, canvas.height), 0, 0);
      this.result = { canvas, left, top };
    }
    this.draw();
  }

  /** How much of the picture, from the left, shows the photo as it was. */
  compare(share: number): void {
    this.split = share;
    this.draw();
  }

  /** The whole photo with the result that is shown. */
  compose(): HTMLCanvasElement {
    const [canvas, context] = makeCanvas(this.width, this.height);
    context.drawImage(this.photo!, 0, 0);
    if (this.result) {
      const { canvas: patch, left, top } = this.result;
      context.putImageData(patch.getContext('2d')!.getImageData(0, 0, patch.width, patch.height), left, top);
    }
    return canvas;
  }

  fit(): void {
    const ratio = devicePixelRatio || 1;
    this.canvas.width = Math.max(Math.round(this.canvas.clientWidth * ratio), 1);
    this.canvas.height = Math.max(Math.round(this.canvas.clientHeight * ratio), 1);
    if (!this.photo) return;
    this.scale = Math.min(this.canvas.width / this.width, this.canvas.height / this.height);
    this.offset = {
      x: (this.canvas.width - this.width * this.scale) / 2,
      y: (this.canvas.height - this.height * this.scale) / 2,
    };
    this.draw();
  }

  /** Zooms around a place on the canvas, its middle by default. */
  zoom(factor: number, around: Point = { x: this.canvas.width / 2, y: this.canvas.height / 2 }): void {
    if (!this.photo) return;
    const least = Math.min(this.canvas.width / this.width, this.canvas.height / this.height) / 2;
    const scale = Math.min(Math.max(this.scale * factor, least), 40);
    this.offset.x = around.x - ((around.x - this.offset.x) * scale) / this.scale;
    this.offset.y = around.y - ((around.y - this.offset.y) * scale) / this.scale;
    this.scale = scale;
    this.draw();
  }

  private place(event: MouseEvent): Point {
    const ratio = this.canvas.width / this.canvas.clientWidth;
    return { x: event.offsetX * ratio, y: event.offsetY * ratio };
  }

  private onPhoto({ x, y }: Point): Point {
    return { x: (x - this.offset.x) / this.scale, y: (y - this.offset.y) / this.scale };
  }

  /** Width of the brush in pixels of the photo. */
  private brush(): number {
    return (this.size * (this.canvas.width / this.canvas.clientWidth)) / this.scale;
  }

  private press(event: PointerEvent): void {
    if (!this.photo) return;
    this.canvas.setPointerCapture(event.pointerId);
    this.pointers.set(event.pointerId, this.place(event));
    if (this.pointers.size > 1) {
      // A second finger: what began as a stroke was the start of a pinch.
      if (this.stroke && this.stroke.points.length < 8) this.undo();
      this.stroke = null;
      return;
    }
    if (event.button === 1 || this.result) return;
    this.stroke = { erase: this.isErasing || event.button === 2, size: this.brush(), points: [] };
    this.marks.push(this.stroke);
    this.extend(this.onPhoto(this.place(event)));
  }

  private drag(event: PointerEvent): void {
    if (!this.photo) return;
    const place = this.place(event);
    this.cursor = this.onPhoto(place);
    const before = this.pointers.get(event.pointerId);
    if (before) {
      const others = [...this.pointers].filter(([id]) => id !== event.pointerId).map(([, point]) => point);
      this.pointers.set(event.pointerId, place);
      if (this.stroke)
        for (const each of event.getCoalescedEvents?.() ?? [event]) this.extend(this.onPhoto(this.place(each)));
      else {
        const share = others.length ? 0.5 : 1;
        this.offset.x += (place.x - before.x) * share;
        this.offset.y += (place.y - before.y) * share;
        if (others.length) {
          const [other] = others;
          const [from, to] = [before, place].map((point) => Math.hypot(point.x - other.x, point.y - other.y));
          if (from > 0) this.zoom(to / from, { x: (place.x + other.x) / 2, y: (place.y + other.y) / 2 });
        }
      }
    }
    this.draw();
  }

  private release(event: PointerEvent): void {
    this.pointers.delete(event.pointerId);
    if (this.stroke) this.onChange();
    this.stroke = null;
  }

  private type(event: KeyboardEvent): void {
    if (!this.photo) return;
    const arrows: Record<string, [number, number]> = {
      ArrowLeft: [-1, 0],
      ArrowRight: [1, 0],
      ArrowUp: [0, -1],
      ArrowDown: [0, 1],
    };
    const actions: Record<string, () => void> = {
      b: () => this.setEraser(false),
      e: () => this.setEraser(true),
      '[': () => this.setSize(this.size - 3),
      ']': () => this.setSize(this.size + 3),
      '+': () => this.zoom(1.25),
      '-': () => this.zoom(0.8),
      '0': () => this.fit(),
      ' ': () => this.stamp([this.cursor!]),
    };
    const isUndo = (event.ctrlKey || event.metaKey) && event.key.toLowerCase() === 'z';
    const step = arrows[event.key];
    if (!isUndo && (event.ctrlKey || event.metaKey || event.altKey)) return;
    if (!isUndo && !step && !(event.key in actions)) return;
    event.preventDefault();
    this.cursor ??= { x: this.width / 2, y: this.height / 2 };
    if (isUndo) this.undo();
    else if (step) {
      const from = this.cursor;
      const length = this.brush() / 2;
      this.cursor = {
        x: Math.min(Math.max(from.x + step[0] * length, 0), this.width),
        y: Math.min(Math.max(from.y + step[1] * length, 0), this.height),
      };
      if (event.shiftKey) this.stamp([from, this.cursor]);
    } else actions[event.key]();
    this.draw();
  }

  /** Told by keys; the page's own controls are told by an event. */
  private setEraser(isErasing: boolean): void {
    this.isErasing = isErasing;
    this.canvas.dispatchEvent(new Event('tool'));
  }

  private setSize(size: number): void {
    this.size = Math.min(Math.max(size, 1), 100);
    this.canvas.dispatchEvent(new Event('tool'));
  }

  private stamp(points: Point[]): void {
    if (!this.result) this.addMark({ erase: this.isErasing, size: this.brush(), points });
  }

  private addMark(mark: Mark): void {
    this.marks.push(mark);
    this.paint(mark);
    this.draw();
    this.onChange();
  }

  private extend(point: Point): void {
    const { points } = this.stroke!;
    points.push(point);
    this.paint({ ...this.stroke!, points: points.slice(-2) });
    this.draw();
  }

  private paint(mark: Mark): void {
    const context = this.maskContext;
    if ('picture' in mark) {
      context.globalCompositeOperation = 'source-over';
      context.drawImage(mark.picture, 0, 0);
      return;
    }
    context.globalCompositeOperation = mark.erase ? 'destination-out' : 'source-over';
    context.lineWidth = mark.size;
    context.lineCap = context.lineJoin = 'round';
    context.strokeStyle = TINT;
    context.beginPath();
    const [first, ...rest] = mark.points;
    context.moveTo(first.x, first.y);
    for (const { x, y } of rest.length ? rest : [first]) context.lineTo(x, y);
    context.stroke();
  }

  private repaint(): void {
    if (!this.photo) return;
    this.maskContext.clearRect(0, 0, this.width, this.height);
    for (const mark of this.marks)
      if ('picture' in mark) this.paint(mark);
      else for (let i = 0; i < Math.max(mark.points.length - 1, 1); i++)
        this.paint({ ...mark, points: mark.points.slice(i, i + 2) });
    this.draw();
    this.onChange();
  }

  private draw(): void {
    if (this.isPending) return;
    this.isPending = true;
    requestAnimationFrame(() => {
      this.isPending = false;
      this.drawNow();
    });
  }

  private drawNow(): void {
    const context = this.canvas.getContext('2d')!;
    context.setTransform(1, 0, 0, 1, 0, 0);
    context.clearRect(0, 0, this.canvas.width, this.canvas.height);
    if (!this.photo) return;
    context.setTransform(this.scale, 0, 0, this.scale, this.offset.x, this.offset.y);
    context.imageSmoothingEnabled = this.scale < 3;
    context.drawImage(this.photo, 0, 0);
    if (this.result) {
      context.save();
      context.beginPath();
      context.rect(this.split * this.width, 0, this.width, this.height);
      context.clip();
      context.drawImage(this.result.canvas, this.result.left, this.result.top);
      context.restore();
      if (this.split > 0) {
        context.fillStyle = '#fff';
        context.fillRect(this.split * this.width - 1 / this.scale, 0, 2 / this.scale, this.height);
      }
      return;
    }
    context.globalAlpha = 0.55;
    context.drawImage(this.mask, 0, 0);
    context.globalAlpha = 1;
    if (!this.cursor) return;
    for (const [color, width] of [['#000', 3], ['#fff', 1.5]] as const) {
      context.beginPath();
      context.arc(this.cursor.x, this.cursor.y, this.brush() / 2, 0, 2 * Math.PI);
      context.strokeStyle = color;
      context.lineWidth = width / this.scale;
      context.stroke();
    }
  }
}
