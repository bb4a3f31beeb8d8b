// Archives of tiny pictures, made on the spot: PNG and zip writers just large enough for the tests.
import { deflateSync } from "node:zlib";

const TABLE = Array.from({ length: 256 }, (_, n) => {
  for (let k = 0; k < 8; k += 1) n = n & 1 ? 0xedb88320 ^ (n >>> 1) : n >>> 1;
  return n >>> 0;
});
function crc32(bytes) {
  let c = 0xffffffff;
  for (const b of bytes) c = TABLE[(c ^ b) & 0xff] ^ (c >>> 8);
  return (c ^ 0xffffffff) >>> 0;
}
const u16 = (n) => Buffer.from([n & 255, (n >> 8) & 255]);
const u32 = (n) => Buffer.concat([u16(n & 0xffff), u16(n >>> 16)]);
const be32 = (n) => Buffer.from([n >>> 24, (n >> 16) & 255, (n >> 8) & 255, n & 255]);

/** A square RGB picture of one colour with a dark dot. */
export function png(side = 64, [r, g, b] = [200, 60, 40]) {
  const lines = [];
  for (let y = 0; y < side; y += 1) {
    lines.push(0);
    for (let x = 0; x < side; x += 1) lines.push(...((x - side / 2) ** 2 + (y - side / 2) ** 2 < (side / 4) ** 2 ? [20, 20, 20] : [r, g, b]));
  }
  const chunk = (kind, data) => {
    const body = Buffer.concat([Buffer.from(kind), data]);
    return Buffer.concat([be32(data.length), body, be32(crc32(body))]);
  };
  return Buffer.concat([
    Buffer.from([137, 80, 78, 71, 13, 10, 26, 10]),
    chunk("IHDR", Buffer.concat([be32(side), be32(side), Buffer.from([8, 2, 0, 0, 0])])),
    chunk("IDAT", deflateSync(Buffer.from(lines))),
    chunk("IEND", Buffer.alloc(0)),
  ]);
}

/** A zip of stored entries. @param {Record<string, Buffer|string>} entries */
export function zip(entries) {
  const parts = [];
  const directory = [];
  let offset = 0;
  for (const [name, content] of Object.entries(entries)) {
    const data = Buffer.from(content);
    const title = Buffer.from(name);
    // version 20, UTF-8 names, stored, 2026-01-01
    const common = Buffer.concat([u16(20), u16(0x800), u16(0), u16(0), u16(0x5c21), u32(crc32(data)), u32(data.length), u32(data.length), u16(title.length), u16(0)]);
    const local = Buffer.concat([u32(0x04034b50), common, title, data]);
    directory.push(Buffer.concat([u32(0x02014b50), u16(20), common, u16(0), u16(0), u16(0), u32(0), u32(offset), title]));
    parts.push(local);
    offset += local.length;
  }
  const central = Buffer.concat(directory);
  const n = directory.length;
  return Buffer.concat([...parts, central, u32(0x06054b50), u16(0), u16(0), u16(n), u16(n), u32(central.length), u32(offset), u16(0)]);
}

/** Captioned pictures as a zip. @param {string[]} captions */
export const captioned = (captions) =>
  zip(Object.fromEntries(captions.flatMap((caption, i) => [[`p${String(i).padStart(2, "0")}.png`, png(64, [40 + i * 20, 200 - i * 15, 90])], [`p${String(i).padStart(2, "0")}.txt`, caption]])));
