//! One picture: bytes to RGB under limits, then to the size and range that a model reads.
//!
//! What the file is called says nothing; its magic bytes decide. Runs in the worker process only, because decoders read
//! hostile bytes.

use std::{
    fs,
    io::{Cursor, ErrorKind},
    path::Path,
};

use candle_core::{Device, Tensor};
use image::{
    DynamicImage, GrayImage, ImageDecoder, ImageError, ImageFormat, Limits, RgbImage, RgbaImage,
    codecs::{jpeg::JpegDecoder, png::PngDecoder, webp::WebPDecoder},
    imageops::{self, FilterType},
};
use lorad_proto::{
    dataset::{ImageVerdict, Item},
    problem::Problem,
};

use super::bucket::Placement;
use crate::Result;

/// Longest side that is decoded, pixels.
const MAX_SIDE: u32 = 8192;
/// Most memory that a decoder may ask for.
const MAX_ALLOC_BYTES: u64 = 256 << 20;
/// Longest side of a thumbnail, pixels.
const THUMBNAIL_SIDE: u32 = 256;

/// How a picture is brought to what a model reads.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Framing {
    /// Its size, before and after the cut.
    pub placement: Placement,
    /// Where the cut lies along each side, 0 (left or top) to 1; 0.5 is the centre.
    pub offset: f64,
    /// Mirrored left to right.
    pub flip: bool,
}

/// Decodes PNG, JPEG or WebP to 8-bit RGB: EXIF rotation applied, transparency on white, 16-bit and grey widened.
///
/// # Errors
/// An [`ImageVerdict::Bad`]'s code and detail: `image.empty`, `image.unsupported_format`, `image.too_large`,
/// `image.animated`, `image.truncated`, `image.undecodable`.
pub fn decode(bytes: &[u8]) -> Result<(RgbImage, ImageFormat), Problem> {
    let (picture, format) = decode_as_stored(bytes)?;
    Ok((on_white(picture), format))
}

/// [`decode`], and how opaque each pixel is, if the file says that.
///
/// # Errors
/// As [`decode`].
pub fn decode_with_alpha(bytes: &[u8]) -> Result<(RgbImage, Option<GrayImage>), Problem> {
    let (picture, _) = decode_as_stored(bytes)?;
    let alpha = picture.color().has_alpha().then(|| {
        let rgba = picture.to_rgba8();
        GrayImage::from_fn(rgba.width(), rgba.height(), |x, y| {
            image::Luma([rgba.get_pixel(x, y).0[3]])
        })
    });
    Ok((on_white(picture), alpha))
}

/// [`decode`] of an item's file, which must be as large as it was when it was uploaded.
///
/// # Errors
/// As [`decode`], with the picture's name in front; `image.wrong_size`.
pub fn decode_as(bytes: &[u8], item: &Item) -> Result<RgbImage, Problem> {
    let named = |mut problem: Problem| {
        problem.detail = format!("{}: {}", item.source, problem.detail);
        problem
    };
    let (picture, _) = decode(bytes).map_err(named)?;
    let (width, height) = picture.dimensions();
    if (width, height) != (item.width, item.height) {
        let detail = format!(
            "It is {width} x {height} pixels, and was {} x {} when it was uploaded.",
            item.width, item.height
        );
        return Err(named(bad("image.wrong_size", &detail)));
    }
    Ok(picture)
}

fn decode_as_stored(bytes: &[u8]) -> Result<(DynamicImage, ImageFormat), Problem> {
    if bytes.is_empty() {
        return Err(bad("image.empty", "The file is empty (0 bytes)."));
    }
    let format = image::guess_format(bytes).map_err(|_| unsupported(bytes))?;
    let decoded = match format {
        ImageFormat::Png => PngDecoder::with_limits(Cursor::new(bytes), limits()).and_then(|decoder| {
            if decoder.is_apng()? {
                return Ok(None);
            }
            finish(decoder).map(Some)
        }),
        // The decoder fills what is missing with grey; only the end marker after the last scan tells.
        ImageFormat::Jpeg if !jpeg_ends(bytes) => return Err(truncated()),
        ImageFormat::Jpeg => JpegDecoder::new(Cursor::new(bytes)).and_then(finish).map(Some),
        // The RIFF header says how long the file is; the decoder reports a shorter one as broken only.
        ImageFormat::WebP if riff_bytes(bytes) > bytes.len() as u64 => return Err(truncated()),
        ImageFormat::WebP => WebPDecoder::new(Cursor::new(bytes)).and_then(|decoder| {
            if decoder.has_animation() {
                return Ok(None);
            }
            finish(decoder).map(Some)
        }),
        _ => return Err(unsupported(bytes)),
    };
    match decoded {
        Ok(Some(picture)) => Ok((picture, format)),
        Ok(None) => Err(bad(
            "image.animated",
            "The picture is animated; only still pictures can be trained on.",
        )),
        Err(e) => Err(decoder_problem(&e)),
    }
}

/// Says what a file is and, if asked, writes a thumbnail (PNG, at most 256 px a side).
pub fn inspect_image(file: &Path, thumbnail: Option<&Path>) -> ImageVerdict {
    let verdict = fs::read(file)
        .map_err(|e| bad("image.unreadable", &format!("The file cannot be read: {e}.")))
        .and_then(|bytes| decode(&bytes))
        .and_then(|(picture, format)| {
            if let Some(path) = thumbnail {
                write_thumbnail(&picture, path)?;
            }
            Ok((picture.dimensions(), format))
        });
    match verdict {
        Ok(((width, height), format)) => ImageVerdict::Ok {
            width,
            height,
            format: match format {
                ImageFormat::Png => "png",
                ImageFormat::Jpeg => "jpeg",
                _ => "webp",
            }
            .to_owned(),
        },
        Err(problem) => ImageVerdict::Bad {
            code: problem.code,
            detail: problem.detail,
        },
    }
}

/// Resizes (Lanczos3), cuts, mirrors if asked, and scales to `[-1, 1]`.
///
/// # Shapes
/// Returns `(3, height, width)` of the placement's size, f32.
///
/// # Errors
/// Only if the tensor cannot be made.
pub fn to_tensor(picture: &RgbImage, framing: Framing, device: &Device) -> Result<Tensor> {
    let Placement {
        size: (width, height),
        resized: (new_width, new_height),
    } = framing.placement;
    let resized = if (new_width, new_height) == picture.dimensions() {
        picture.clone()
    } else {
        imageops::resize(picture, new_width, new_height, FilterType::Lanczos3)
    };
    let offset = framing.offset.clamp(0.0, 1.0);
    let place = |length: u32, kept: u32| (f64::from(length.saturating_sub(kept)) * offset).round() as u32;
    let (left, top) = (place(new_width, width), place(new_height, height));
    let mut cut = imageops::crop_imm(&resized, left, top, width, height).to_image();
    if framing.flip {
        imageops::flip_horizontal_in_place(&mut cut);
    }
    let values: Vec<f32> = cut.as_raw().iter().map(|&v| f32::from(v) / 127.5 - 1.0).collect();
    Ok(Tensor::from_vec(values, (height as usize, width as usize, 3), device)?
        .permute((2, 0, 1))?
        .contiguous()?)
}

/// A mask in the latents' size: cut like its picture, then each latent position takes the mean of its pixels.
///
/// # Shapes
/// Returns `(1, height / downscale, width / downscale)` of the placement's size, f32 from 0 (black) to 1 (white).
///
/// # Errors
/// Only if the tensor cannot be made.
///
/// # Source
/// kohya sd-scripts 48d368f `library/custom_train_functions.py`, `apply_masked_loss` (`interpolate(mode="area")`).
pub fn mask_tensor(mask: &GrayImage, framing: Framing, downscale: usize, device: &Device) -> Result<Tensor> {
    let rgb = DynamicImage::ImageLuma8(mask.clone()).into_rgb8();
    let pixels = to_tensor(&rgb, framing, device)?.narrow(0, 0, 1)?.unsqueeze(0)?;
    Ok(((pixels.avg_pool2d(downscale)? + 1.0)? / 2.0)?.squeeze(0)?)
}

/// Share of near-black pixels (largest channel < 60) within the drawing (smallest channel < 235).
pub fn near_black_share(png: &[u8]) -> Option<f64> {
    let (picture, _) = decode(png).ok()?;
    let drawn: Vec<u8> = picture
        .pixels()
        .filter(|p| p.0.iter().min().is_some_and(|&low| low < 235))
        .filter_map(|p| p.0.iter().max().copied())
        .collect();
    if drawn.is_empty() {
        return None;
    }
    Some(drawn.iter().filter(|&&high| high < 60).count() as f64 / drawn.len() as f64)
}

fn limits() -> Limits {
    let mut limits = Limits::default();
    limits.max_image_width = Some(MAX_SIDE);
    limits.max_image_height = Some(MAX_SIDE);
    limits.max_alloc = Some(MAX_ALLOC_BYTES);
    limits
}

/// Decodes and turns the picture as its EXIF data says.
fn finish<D: ImageDecoder>(mut decoder: D) -> image::ImageResult<DynamicImage> {
    let mut limits = limits();
    let (width, height) = decoder.dimensions();
    limits.check_dimensions(width, height)?;
    // Set before anything is decoded; `reserve` covers the picture itself, which decoders do not count.
    limits.reserve(decoder.total_bytes())?;
    decoder.set_limits(limits)?;
    let orientation = decoder.orientation()?;
    let mut picture = DynamicImage::from_decoder(decoder)?;
    picture.apply_orientation(orientation);
    Ok(picture)
}

/// 8-bit RGB; transparent parts show white, as on a page.
fn on_white(picture: DynamicImage) -> RgbImage {
    if !picture.color().has_alpha() {
        return picture.into_rgb8();
    }
    let rgba: RgbaImage = picture.into_rgba8();
    RgbImage::from_fn(rgba.width(), rgba.height(), |x, y| {
        let [r, g, b, a] = rgba.get_pixel(x, y).0.map(u32::from);
        image::Rgb([r, g, b].map(|c| ((c * a + 255 * (255 - a) + 127) / 255) as u8))
    })
}

fn write_thumbnail(picture: &RgbImage, path: &Path) -> Result<(), Problem> {
    let longest = picture.width().max(picture.height());
    let small = if longest > THUMBNAIL_SIDE {
        let shrink = |side: u32| (side * THUMBNAIL_SIDE / longest).max(1);
        imageops::resize(
            picture,
            shrink(picture.width()),
            shrink(picture.height()),
            FilterType::Triangle,
        )
    } else {
        picture.clone()
    };
    small.save_with_format(path, ImageFormat::Png).map_err(|e| {
        bad(
            "image.thumbnail_failed",
            &format!("The thumbnail cannot be written: {e}."),
        )
    })
}

/// Length of a RIFF file as its header tells.
fn riff_bytes(bytes: &[u8]) -> u64 {
    let size = bytes
        .get(4..8)
        .and_then(|b| b.try_into().ok())
        .map_or(u32::MAX, u32::from_le_bytes);
    u64::from(size) + 8
}

/// Whether an end marker follows the last start of a scan.
fn jpeg_ends(bytes: &[u8]) -> bool {
    let last = |marker: [u8; 2]| bytes.windows(2).rposition(|pair| pair == marker);
    last([0xFF, 0xD9]) > last([0xFF, 0xDA])
}

fn truncated() -> Problem {
    bad("image.truncated", "The file ends before the picture does.")
}

fn bad(code: &str, detail: &str) -> Problem {
    Problem::new(code, "The picture cannot be used", detail)
}

fn unsupported(bytes: &[u8]) -> Problem {
    let what = image::guess_format(bytes).map_or("an unknown format".to_owned(), |f| format!("{f:?}"));
    bad(
        "image.unsupported_format",
        &format!("The content is {what}; PNG, JPEG and WebP are read."),
    )
}

fn decoder_problem(e: &ImageError) -> Problem {
    match e {
        ImageError::Limits(_) => bad(
            "image.too_large",
            &format!(
                "The picture is larger than {MAX_SIDE} pixels a side or {} MiB decoded.",
                MAX_ALLOC_BYTES >> 20
            ),
        ),
        ImageError::IoError(io) if io.kind() == ErrorKind::UnexpectedEof => truncated(),
        other => {
            let text = other.to_string();
            let lower = text.to_lowercase();
            // Decoders report a cut file as a format error of their own; these are their words for it.
            if [
                "eof",
                "end of file",
                "end of image",
                "unexpected end",
                "truncated",
                "no more bytes",
            ]
            .iter()
            .any(|word| lower.contains(word))
            {
                return truncated();
            }
            bad("image.undecodable", &format!("The picture cannot be decoded: {text}."))
        }
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use image::{Rgb, Rgba};

    use super::*;
    use crate::data::{BucketConfig, Buckets};

    fn encode(picture: &DynamicImage, format: ImageFormat) -> Vec<u8> {
        let mut bytes = Cursor::new(Vec::new());
        picture.write_to(&mut bytes, format).unwrap();
        bytes.into_inner()
    }

    /// Left half red, right half blue.
    fn halves(width: u32, height: u32) -> RgbImage {
        RgbImage::from_fn(width, height, |x, _| {
            if x < width / 2 {
                Rgb([255, 0, 0])
            } else {
                Rgb([0, 0, 255])
            }
        })
    }

    fn code(bytes: &[u8]) -> String {
        decode(bytes).unwrap_err().code
    }

    #[test]
    fn the_content_decides_about_the_format_not_the_name() {
        let dir = tempfile::tempdir().unwrap();
        let file = dir.path().join("liar.jpg");
        for (format, name) in [
            (ImageFormat::Png, "png"),
            (ImageFormat::WebP, "webp"),
            (ImageFormat::Jpeg, "jpeg"),
        ] {
            fs::write(&file, encode(&halves(12, 8).into(), format)).unwrap();
            assert_eq!(
                inspect_image(&file, None),
                ImageVerdict::Ok {
                    width: 12,
                    height: 8,
                    format: name.to_owned()
                }
            );
        }
    }

    #[test]
    fn empty_truncated_and_foreign_files_are_named() {
        assert_eq!(code(b""), "image.empty");
        assert_eq!(code(b"hello, this is a text file"), "image.unsupported_format");
        assert_eq!(code(b"GIF89a\x01\x00\x01\x00\x00\x00\x00;"), "image.unsupported_format");
        let noise = RgbImage::from_fn(64, 64, |x, y| {
            Rgb([(x * 37 + y * 91) as u8, (x * y) as u8, (x ^ y) as u8])
        });
        for format in [ImageFormat::Png, ImageFormat::WebP, ImageFormat::Jpeg] {
            let bytes = encode(&noise.clone().into(), format);
            for keep in [bytes.len() / 2, bytes.len() / 8, 16] {
                let got = code(&bytes[..keep]);
                assert!(
                    got == "image.truncated",
                    "{format:?} cut to {keep} of {}: {got}",
                    bytes.len()
                );
            }
        }
    }

    #[test]
    fn a_header_that_claims_a_huge_picture_is_refused_before_memory_is_taken() {
        let mut png = encode(&halves(8, 8).into(), ImageFormat::Png);
        // IHDR width and height, then its CRC.
        png[16..24].copy_from_slice(&[0, 1, 0, 0, 0, 1, 0, 0]);
        let crc = crc32(&png[12..29]);
        png[29..33].copy_from_slice(&crc.to_be_bytes());
        assert_eq!(code(&png), "image.too_large");
    }

    fn crc32(bytes: &[u8]) -> u32 {
        !bytes.iter().fold(!0_u32, |crc, &b| {
            (0..8).fold(crc ^ u32::from(b), |c, _| {
                if c & 1 == 1 { (c >> 1) ^ 0xEDB8_8320 } else { c >> 1 }
            })
        })
    }

    #[test]
    fn transparency_shows_white_and_16_bit_and_grey_become_rgb() {
        let clear = RgbaImage::from_pixel(4, 4, Rgba([10, 20, 30, 0]));
        let (white, _) = decode(&encode(&clear.into(), ImageFormat::Png)).unwrap();
        assert_eq!(white.get_pixel(0, 0).0, [255, 255, 255]);
        let half = RgbaImage::from_pixel(4, 4, Rgba([0, 0, 0, 128]));
        let (grey, _) = decode(&encode(&half.into(), ImageFormat::Png)).unwrap();
        assert_eq!(grey.get_pixel(0, 0).0, [127, 127, 127]);
        let deep = image::ImageBuffer::from_pixel(4, 4, image::Luma([65_535_u16]));
        let (deep, _) = decode(&encode(&DynamicImage::ImageLuma16(deep), ImageFormat::Png)).unwrap();
        assert_eq!(deep.get_pixel(3, 3).0, [255, 255, 255]);
    }

    /// A JPEG with an EXIF block that says how the camera was held.
    fn jpeg_with_orientation(picture: &RgbImage, orientation: u8) -> Vec<u8> {
        let plain = encode(&picture.clone().into(), ImageFormat::Jpeg);
        let mut exif = b"\xFF\xE1\x00\x22Exif\0\0MM\0\x2A\0\0\0\x08\0\x01\x01\x12\0\x03\0\0\0\x01\0".to_vec();
        exif.extend([orientation, 0, 0, 0, 0, 0, 0]);
        [&plain[..2], &exif, &plain[2..]].concat()
    }

    #[test]
    fn exif_rotation_is_applied() {
        let upright = decode(&jpeg_with_orientation(&halves(32, 16), 1)).unwrap().0;
        assert_eq!(upright.dimensions(), (32, 16));
        // 6: turn clockwise by 90 degrees, so the left half comes to lie on top.
        let turned = decode(&jpeg_with_orientation(&halves(32, 16), 6)).unwrap().0;
        assert_eq!(turned.dimensions(), (16, 32));
        assert!(turned.get_pixel(8, 4).0[0] > 200 && turned.get_pixel(8, 28).0[2] > 200);
    }

    fn square(resolution: u32, width: u32, height: u32) -> Placement {
        let off = BucketConfig {
            enable_bucket: false,
            min_bucket_reso: None,
            max_bucket_reso: None,
            bucket_reso_steps: None,
            bucket_no_upscale: false,
        };
        Buckets::new(resolution, &off).place(width, height)
    }

    #[test]
    fn framing_cuts_mirrors_and_scales() {
        let wide = halves(64, 16);
        let red = |t: &Tensor| t.get(0).unwrap().mean_all().unwrap().to_scalar::<f32>().unwrap();
        let frame = |offset, flip| {
            let framing = Framing {
                placement: square(16, 64, 16),
                offset,
                flip,
            };
            to_tensor(&wide, framing, &Device::Cpu).unwrap()
        };
        assert_eq!(frame(0.5, false).dims(), [3, 16, 16]);
        assert_eq!(red(&frame(0.0, false)), 1.0, "the left end is red");
        assert_eq!(red(&frame(1.0, false)), -1.0, "the right end is blue");
        let centre = frame(0.5, false);
        let mirrored = frame(0.5, true);
        let corner = |t: &Tensor| {
            t.get(0)
                .unwrap()
                .get(0)
                .unwrap()
                .get(0)
                .unwrap()
                .to_scalar::<f32>()
                .unwrap()
        };
        assert_eq!((corner(&centre), corner(&mirrored)), (1.0, -1.0));
        let up = Framing {
            placement: square(40, 7, 9),
            offset: 0.5,
            flip: false,
        };
        assert_eq!(to_tensor(&halves(7, 9), up, &Device::Cpu).unwrap().dims(), [3, 40, 40]);
        let wide = Framing {
            placement: Placement {
                size: (48, 16),
                resized: (52, 16),
            },
            ..up
        };
        assert_eq!(
            to_tensor(&halves(64, 20), wide, &Device::Cpu).unwrap().dims(),
            [3, 16, 48]
        );
    }

    #[test]
    fn a_mask_is_the_mean_over_each_latent_position() {
        let mask = GrayImage::from_fn(32, 16, |x, _| image::Luma([if x < 20 { 255 } else { 0 }]));
        let framing = Framing {
            placement: Placement {
                size: (32, 16),
                resized: (32, 16),
            },
            offset: 0.5,
            flip: false,
        };
        let values = |flip| {
            let t = mask_tensor(&mask, Framing { flip, ..framing }, 8, &Device::Cpu).unwrap();
            assert_eq!(t.dims(), [1, 2, 4]);
            t.get(0).unwrap().get(1).unwrap().to_vec1::<f32>().unwrap()
        };
        assert_eq!(values(false), [1.0, 1.0, 0.5, 0.0]);
        assert_eq!(values(true), [0.0, 0.5, 1.0, 1.0]);
    }

    #[test]
    fn transparency_is_told_where_a_file_has_it() {
        let glass = RgbaImage::from_fn(4, 2, |x, _| Rgba([0, 0, 0, (x * 80) as u8]));
        let (_, alpha) = decode_with_alpha(&encode(&glass.into(), ImageFormat::Png)).unwrap();
        assert_eq!(alpha.unwrap().as_raw(), &[0, 80, 160, 240, 0, 80, 160, 240]);
        let (_, alpha) = decode_with_alpha(&encode(&halves(4, 4).into(), ImageFormat::Png)).unwrap();
        assert!(alpha.is_none());
    }

    #[test]
    fn thumbnails_fit_256_pixels() {
        let dir = tempfile::tempdir().unwrap();
        let (file, thumb) = (dir.path().join("a.png"), dir.path().join("t.png"));
        fs::write(&file, encode(&halves(600, 300).into(), ImageFormat::Png)).unwrap();
        assert!(matches!(inspect_image(&file, Some(&thumb)), ImageVerdict::Ok { .. }));
        assert_eq!(image::open(&thumb).unwrap().into_rgb8().dimensions(), (256, 128));
    }

    #[test]
    fn the_near_black_share_counts_within_the_drawing_only() {
        let picture = RgbImage::from_fn(4, 1, |x, _| match x {
            0 => Rgb([0, 0, 0]),
            1 => Rgb([59, 10, 0]),
            2 => Rgb([60, 0, 0]),
            _ => Rgb([255, 255, 255]),
        });
        let share = near_black_share(&encode(&picture.into(), ImageFormat::Png)).unwrap();
        assert!((share - 2.0 / 3.0).abs() < 1e-12);
        let blank = RgbImage::from_pixel(4, 4, Rgb([250, 250, 250]));
        assert_eq!(near_black_share(&encode(&blank.into(), ImageFormat::Png)), None);
        assert_eq!(near_black_share(b"no picture"), None);
    }
}
