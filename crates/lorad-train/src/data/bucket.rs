//! Which size a picture is trained at: one square for all, or the bucket that fits its aspect ratio best.
//!
//! Buckets are kohya's, by name and by formula, so that settings and expectations carry over: sizes are multiples of
//! `bucket_reso_steps`, none has more pixels than `resolution`², and a picture goes to the one with the nearest aspect
//! ratio. A pure function of the settings and the picture's size.

use serde::Deserialize;

/// kohya's bucket settings, resolved.
#[derive(Debug, Clone, PartialEq, Eq, Deserialize)]
pub struct BucketConfig {
    /// Whether pictures keep their aspect ratio; otherwise all become squares.
    pub enable_bucket: bool,
    /// Shortest side, pixels. `None`: not used.
    pub min_bucket_reso: Option<u32>,
    /// Longest side, pixels. `None`: not used.
    pub max_bucket_reso: Option<u32>,
    /// Sides are multiples of it, pixels. `None`: not used.
    pub bucket_reso_steps: Option<u32>,
    /// Only shrink; each picture then makes its own bucket.
    pub bucket_no_upscale: bool,
}

/// How one picture is brought to size: first resized, then cut.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub struct Placement {
    /// Width and height that the model reads, pixels.
    pub size: (u32, u32),
    /// Width and height before the cut, pixels; nowhere less than `size`.
    pub resized: (u32, u32),
}

impl Placement {
    /// Whether the cut takes nothing away.
    pub fn fits(self) -> bool {
        self.size == self.resized
    }
}

/// The sizes that pictures are trained at.
#[derive(Debug)]
pub struct Buckets {
    resolution: u32,
    kind: Sizes,
}

#[derive(Debug)]
enum Sizes {
    Square,
    /// Sorted by width, then height.
    Listed(Vec<(u32, u32)>),
    NoUpscale {
        steps: u32,
    },
}

impl Buckets {
    /// The sizes for this resolution.
    pub fn new(resolution: u32, config: &BucketConfig) -> Self {
        let steps = config.bucket_reso_steps.unwrap_or(64).max(1);
        let kind = if !config.enable_bucket {
            Sizes::Square
        } else if config.bucket_no_upscale {
            Sizes::NoUpscale { steps }
        } else {
            let (min, max) = (
                config.min_bucket_reso.unwrap_or(256),
                config.max_bucket_reso.unwrap_or(1024),
            );
            Sizes::Listed(list(resolution, min, max, steps))
        };
        Self { resolution, kind }
    }

    /// Where a picture of this size goes.
    ///
    /// # Source
    /// kohya sd-scripts 48d368f `library/train_util.py`, `BucketManager.select_bucket`.
    pub fn place(&self, width: u32, height: u32) -> Placement {
        let (width, height) = (width.max(1), height.max(1));
        match &self.kind {
            Sizes::Square => self.square(width, height),
            Sizes::Listed(sizes) => nearest(sizes, width, height),
            Sizes::NoUpscale { steps } => self.shrunk(width, height, *steps),
        }
    }

    /// The shorter side becomes exactly the resolution; rounding may not make the longer one shorter than that.
    fn square(&self, width: u32, height: u32) -> Placement {
        let side = self.resolution;
        let short = u64::from(width.min(height));
        let scaled = |length: u32| {
            let exact = u64::from(length) * u64::from(side);
            u32::try_from((exact + short / 2) / short).unwrap_or(u32::MAX).max(side)
        };
        Placement {
            size: (side, side),
            resized: (scaled(width), scaled(height)),
        }
    }

    /// `bucket_no_upscale`: a picture with too many pixels shrinks, then each side loses what is not a whole step. A
    /// picture smaller than one step, which kohya cannot train on, grows to it.
    fn shrunk(&self, width: u32, height: u32, steps: u32) -> Placement {
        let whole = |length: u32| (length - length % steps).max(steps);
        let max_area = f64::from(self.resolution).powi(2);
        let aspect = f64::from(width) / f64::from(height);
        let resized = if f64::from(width) * f64::from(height) > max_area {
            let exact_width = (max_area * aspect).sqrt();
            let by_width = whole(rounded(exact_width));
            let by_height = whole(rounded(max_area / exact_width));
            // The side that becomes a whole number of steps is the one that keeps the aspect ratio better.
            let error = |w: u32, h: u32| (f64::from(w) / f64::from(h) - aspect).abs();
            let (height_of, width_of) = (f64::from(by_width) / aspect, f64::from(by_height) * aspect);
            if error(by_width, whole(rounded(height_of))) < error(whole(rounded(width_of)), by_height) {
                (by_width, rounded(height_of))
            } else {
                (rounded(width_of), by_height)
            }
        } else {
            (width, height)
        };
        let size = (whole(resized.0), whole(resized.1));
        Placement {
            size,
            resized: (resized.0.max(size.0), resized.1.max(size.1)),
        }
    }
}

/// Every size between `min` and `max` with at most `resolution`² pixels, sorted.
///
/// # Source
/// kohya sd-scripts 48d368f `library/model_util.py`, `make_bucket_resolutions`.
fn list(resolution: u32, min: u32, max: u32, steps: u32) -> Vec<(u32, u32)> {
    let area = u64::from(resolution).pow(2);
    let side = (resolution / steps).max(1) * steps;
    let mut sizes = vec![(side, side)];
    let mut width = min.max(1);
    while width <= max {
        let fitting = area / u64::from(width) / u64::from(steps) * u64::from(steps);
        let height = u32::try_from(fitting).unwrap_or(u32::MAX).min(max);
        if height >= min.max(1) {
            sizes.extend([(width, height), (height, width)]);
        }
        width += steps;
    }
    sizes.sort_unstable();
    sizes.dedup();
    sizes
}

/// The size with the nearest aspect ratio (the first of several), unless the picture has one of the sizes already.
fn nearest(sizes: &[(u32, u32)], width: u32, height: u32) -> Placement {
    let ratio = |(w, h): (u32, u32)| f64::from(w) / f64::from(h);
    let aspect = ratio((width, height));
    let mut size = sizes[0];
    if sizes.contains(&(width, height)) {
        size = (width, height);
    } else {
        for &other in sizes {
            if (ratio(other) - aspect).abs() < (ratio(size) - aspect).abs() {
                size = other;
            }
        }
    }
    let scale = if aspect > ratio(size) {
        f64::from(size.1) / f64::from(height)
    } else {
        f64::from(size.0) / f64::from(width)
    };
    let scaled = |length: u32, least: u32| rounded(f64::from(length) * scale).max(least);
    Placement {
        size,
        resized: (scaled(width, size.0), scaled(height, size.1)),
    }
}

fn rounded(length: f64) -> u32 {
    (length + 0.5) as u32
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn config(no_upscale: bool) -> BucketConfig {
        BucketConfig {
            enable_bucket: true,
            min_bucket_reso: Some(256),
            max_bucket_reso: Some(1024),
            bucket_reso_steps: Some(64),
            bucket_no_upscale: no_upscale,
        }
    }

    /// Picture, bucket and size before the cut, printed by sd-scripts 48d368f `BucketManager` (resolution 512, 256 to
    /// 1024, steps of 64).
    const KOHYA: &[[u32; 6]] = &[
        [512, 512, 512, 512, 512, 512],
        [1000, 1000, 512, 512, 512, 512],
        [1920, 1080, 640, 384, 683, 384],
        [1080, 1920, 384, 640, 384, 683],
        [640, 480, 576, 448, 597, 448],
        [480, 640, 448, 576, 448, 597],
        [3000, 2000, 640, 384, 640, 427],
        [800, 1200, 384, 640, 427, 640],
        [100, 100, 512, 512, 512, 512],
        [300, 200, 640, 384, 640, 427],
        [256, 1024, 256, 1024, 256, 1024],
        [4000, 500, 1024, 256, 2048, 256],
        [123, 457, 256, 960, 258, 960],
        [777, 512, 640, 384, 640, 422],
        [512, 777, 384, 640, 422, 640],
        [1023, 1025, 512, 512, 512, 513],
        [2048, 858, 768, 320, 768, 322],
    ];
    const KOHYA_NO_UPSCALE: &[[u32; 6]] = &[
        [512, 512, 512, 512, 512, 512],
        [1000, 1000, 512, 512, 512, 512],
        [1920, 1080, 640, 384, 683, 384],
        [1080, 1920, 384, 640, 384, 683],
        [640, 480, 512, 384, 512, 384],
        [480, 640, 384, 512, 384, 512],
        [3000, 2000, 576, 384, 576, 384],
        [800, 1200, 384, 576, 384, 576],
        [100, 100, 64, 64, 100, 100],
        [300, 200, 256, 192, 300, 200],
        [256, 1024, 256, 1024, 256, 1024],
        [4000, 500, 1024, 128, 1024, 128],
        [123, 457, 64, 448, 123, 457],
        [777, 512, 576, 384, 583, 384],
        [512, 777, 384, 576, 384, 583],
        [1023, 1025, 512, 512, 512, 513],
        [2048, 858, 768, 320, 768, 322],
    ];

    #[test]
    fn pictures_go_where_kohya_puts_them() {
        for (no_upscale, rows) in [(false, KOHYA), (true, KOHYA_NO_UPSCALE)] {
            let buckets = Buckets::new(512, &config(no_upscale));
            for [width, height, w, h, rw, rh] in rows {
                let expected = Placement {
                    size: (*w, *h),
                    resized: (*rw, *rh),
                };
                assert_eq!(
                    buckets.place(*width, *height),
                    expected,
                    "{width} x {height}, no_upscale {no_upscale}"
                );
            }
        }
    }

    proptest! {
        #[test]
        fn every_size_is_whole_steps_within_the_area_and_the_cut_only_takes_away(
            width in 1_u32..5000, height in 1_u32..5000, no_upscale: bool, resolution in 8_u32..24,
        ) {
            let resolution = resolution * 64;
            let config = BucketConfig {
                min_bucket_reso: Some(resolution / 2 / 64 * 64),
                max_bucket_reso: Some(resolution * 2),
                ..config(no_upscale)
            };
            let Placement { size, resized } = Buckets::new(resolution, &config).place(width, height);
            prop_assert!(size.0.is_multiple_of(64) && size.1.is_multiple_of(64) && size.0 > 0 && size.1 > 0);
            prop_assert!(resized.0 >= size.0 && resized.1 >= size.1);
            let thin = width.max(height) / width.min(height) > 8;
            prop_assert!(thin || u64::from(size.0) * u64::from(size.1) <= u64::from(resolution).pow(2));
        }

        #[test]
        fn a_square_picture_is_treated_as_without_buckets(side in 1_u32..3000, resolution in 1_u32..20) {
            let resolution = resolution * 64;
            let with = BucketConfig {
                min_bucket_reso: Some((resolution / 2 / 64 * 64).max(64)),
                max_bucket_reso: Some(resolution * 2),
                ..config(false)
            };
            let without = BucketConfig { enable_bucket: false, ..with.clone() };
            prop_assert_eq!(
                Buckets::new(resolution, &with).place(side, side),
                Buckets::new(resolution, &without).place(side, side)
            );
        }
    }
}
