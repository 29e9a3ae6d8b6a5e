/** A landscape with a balloon that can go, drawn here so that no photo has to be loaded. */

import { makeCanvas } from './editor';

export function drawExample(): HTMLCanvasElement {
  const [canvas, context] = makeCanvas(768, 512);
  const fill = (from: string, to: string, top: number, bottom: number) => {
    const gradient = context.createLinearGradient(0, top, 0, bottom);
    gradient.addColorStop(0, from);
    gradient.addColorStop(1, to);
    context.fillStyle = gradient;
  };
  fill('#3f7fc4', '#dbe9f2', 0, 380);
  context.fillRect(0, 0, 768, 512);
  for (const [from, to, base, height, pace] of [
    ['#8aa6b8', '#7391a3', 330, 46, 150],
    ['#6f9468', '#4d7447', 380, 30, 97],
    ['#89a553', '#4b6a2b', 430, 16, 61],
  ] as const) {
    fill(from, to, base - height, 512);
    context.beginPath();
    context.moveTo(0, 512);
    for (let x = 0; x <= 768; x += 2) context.lineTo(x, base - height * Math.sin(x / pace) * Math.cos(x / (2.3 * pace)));
    context.lineTo(768, 512);
    context.fill();
  }
  context.strokeStyle = '#3c2f2a';
  context.lineWidth = 1.5;
  for (const x of [506, 534]) {
    context.beginPath();
    context.moveTo(x, 190);
    context.lineTo(x + (520 - x) * 0.4, 232);
    context.stroke();
  }
  fill('#e8453c', '#9d1f2f', 90, 210);
  context.beginPath();
  context.ellipse(520, 145, 48, 58, 0, 0, 2 * Math.PI);
  context.fill();
  context.fillStyle = '#7a5230';
  context.fillRect(508, 230, 24, 18);
  return canvas;
}
