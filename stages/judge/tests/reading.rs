//! The reader on renders of random scenes: clean, noisy, blurred, and both; and how fast it is.

#[cfg(not(debug_assertions))]
use std::time::Instant;

use deepgen_contract::shapes::{Background, Colour, Object, Scene, Shape, ShapesWorld, Word};
use deepgen_judge::reading::{Found, Reader};
use image::{Rgb, RgbImage};

/// Fewer where the code is not optimised.
const NUM_SCENES: usize = if cfg!(debug_assertions) { 60 } else { 400 };

struct Random(u64);

impl Random {
    fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let z = (self.0 ^ (self.0 >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        let z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ (z >> 31)
    }

    fn below(&mut self, bound: usize) -> usize {
        (self.next() % bound as u64) as usize
    }

    fn pick<T: Clone>(&mut self, values: &[T]) -> T {
        values[self.below(values.len())].clone()
    }

    /// A sum of twelve uniform numbers, centred: close to normal.
    fn normal(&mut self) -> f32 {
        (0..12).map(|_| (self.next() >> 40) as f32 / (1u64 << 24) as f32).sum::<f32>() - 6.0
    }
}

fn rich_world() -> ShapesWorld {
    ShapesWorld {
        side: 48,
        cells: 3,
        shapes: Shape::ALL.to_vec(),
        colours: Colour::ALL.to_vec(),
        backgrounds: Background::ALL.to_vec(),
        words: ["cat", "dog", "sun", "b52"].map(str::to_owned).to_vec(),
        ..ShapesWorld::default()
    }
}

fn scene(world: &ShapesWorld, random: &mut Random) -> Scene {
    let row = random.pick(&world.word_rows());
    let has_word = random.below(2) == 0;
    let word = has_word.then(|| Word { text: random.pick(&world.words), row });
    let mut objects = Vec::new();
    for cell in world.all_cells() {
        let is_free = word.as_ref().is_none_or(|word| word.row != cell.row);
        if is_free && random.below(2) == 0 {
            let (shape, colour) = (random.pick(&world.shapes), random.pick(&world.colours));
            objects.push(Object { shape, colour, row: cell.row, col: cell.col });
        }
    }
    Scene { objects, word, background: random.pick(&world.backgrounds) }
}

fn paint(world: &ShapesWorld, scene: &Scene) -> RgbImage {
    RgbImage::from_raw(world.side as u32, world.side as u32, world.paint(scene)).unwrap()
}

fn noisy(image: &RgbImage, sigma: f32, random: &mut Random) -> RgbImage {
    let mut image = image.clone();
    for level in image.iter_mut() {
        *level = (f32::from(*level) + sigma * random.normal()).round().clamp(0.0, 255.0) as u8;
    }
    image
}

/// Blurs with the 3x3 binomial kernel.
fn blurred(image: &RgbImage) -> RgbImage {
    let (width, height) = image.dimensions();
    RgbImage::from_fn(width, height, |x, y| {
        let mut sums = [0u32; 3];
        for (dy, wy) in [(0, 1), (1, 2), (2, 1)] {
            for (dx, wx) in [(0, 1), (1, 2), (2, 1)] {
                let near = |at: u32, by: u32, end: u32| (at + by).saturating_sub(1).min(end - 1);
                let pixel = image.get_pixel(near(x, dx, width), near(y, dy, height));
                sums.iter_mut().zip(pixel.0).for_each(|(sum, level)| *sum += wx * wy * u32::from(level));
            }
        }
        Rgb(sums.map(|sum| ((sum + 8) / 16) as u8))
    })
}

/// Returns whether the reading is the scene exactly: nothing missing, nothing else.
fn is_right(found: &Found, scene: &Scene) -> bool {
    let word = scene.word.as_ref().map(|word| (word.text.as_str(), word.row));
    let read = found.words.first().map(|word| (word.text.as_str(), found.cell(&word.at).row));
    found.objects.len() == scene.objects.len()
        && found.words.len() == usize::from(word.is_some())
        && read == word
        && found.background == scene.background
        && scene.objects.iter().all(|wanted| {
            found.object_at(wanted.cell()).is_some_and(|o| o.shape == wanted.shape && o.colour == wanted.colour)
        })
}

/// Returns the share of scenes that are read exactly.
fn accuracy(world: &ShapesWorld, name: &str, degrade: impl Fn(RgbImage, &mut Random) -> RgbImage) -> f64 {
    let reader = Reader::new(world).unwrap();
    let mut random = Random(7);
    let mut right = 0;
    for _ in 0..NUM_SCENES {
        let scene = scene(world, &mut random);
        let image = degrade(paint(world, &scene), &mut random);
        right += usize::from(is_right(&reader.read(&image), &scene));
    }
    let share = right as f64 / NUM_SCENES as f64;
    println!("{} cells, {name}: {share:.4} of {NUM_SCENES} scenes", world.cells);
    share
}

#[test]
fn clean_images_are_read_exactly() {
    for world in [ShapesWorld::default(), rich_world()] {
        assert_eq!(accuracy(&world, "clean", |image, _| image), 1.0);
    }
}

#[test]
fn noise_of_20_levels_does_no_harm() {
    let noise = |image: RgbImage, random: &mut Random| noisy(&image, 20.0, random);
    assert_eq!(accuracy(&ShapesWorld::default(), "noisy", noise), 1.0);
    assert!(accuracy(&rich_world(), "noisy", noise) >= 0.98);
}

#[test]
fn blur_does_no_harm() {
    for world in [ShapesWorld::default(), rich_world()] {
        assert!(accuracy(&world, "blurred", |image, _| blurred(&image)) >= 0.99);
        let both = |image: RgbImage, random: &mut Random| noisy(&blurred(&image), 20.0, random);
        assert!(accuracy(&world, "blurred and noisy", both) >= 0.98);
        let hard = |image: RgbImage, random: &mut Random| noisy(&blurred(&blurred(&image)), 40.0, random);
        accuracy(&world, "blurred twice and very noisy", hard);
    }
}

#[test]
fn empty_flat_and_random_images_hold_nothing() {
    let reader = Reader::new(&ShapesWorld::default()).unwrap();
    for level in [0, 16, 128, 255] {
        let found = reader.read(&RgbImage::from_pixel(32, 32, Rgb([level; 3])));
        assert!(found.objects.is_empty() && found.words.is_empty(), "{level}: {found:?}");
    }
    let mut random = Random(1);
    let mut false_finds = 0;
    for _ in 0..100 {
        let image = RgbImage::from_fn(32, 32, |_, _| Rgb(std::array::from_fn(|_| random.next() as u8)));
        let found = reader.read(&image);
        false_finds += found.objects.len() + found.words.len();
    }
    println!("false finds in 100 images of white noise: {false_finds}");
    assert_eq!(false_finds, 0);
    assert!(reader.read(&RgbImage::new(8, 8)).objects.is_empty(), "an image smaller than a shape");
}

#[test]
fn shapes_may_stand_off_the_grid() {
    let world = ShapesWorld::default();
    let reader = Reader::new(&world).unwrap();
    let object = Object { shape: Shape::Triangle, colour: Colour::Blue, row: 0, col: 1 };
    let scene = Scene { objects: vec![object], word: None, background: Background::Black };
    let image = paint(&world, &scene);
    let back = Background::Black.rgb();
    let moved =
        RgbImage::from_fn(32, 32, |x, y| if y < 2 || x > 29 { Rgb(back) } else { *image.get_pixel(x + 2, y - 2) });
    let found = reader.read(&moved);
    assert_eq!(found.objects.len(), 1);
    assert_eq!((found.objects[0].at.x, found.objects[0].at.y), (16, 4));
    assert_eq!((found.objects[0].shape, found.objects[0].score), (Shape::Triangle, 1.0));
}

/// Optimised builds only: a debug build is some 30 times slower.
#[test]
#[cfg(not(debug_assertions))]
fn more_than_300_images_a_second_are_read() {
    let world = ShapesWorld::default();
    let reader = Reader::new(&world).unwrap();
    let mut random = Random(3);
    let mut image = || {
        let scene = scene(&world, &mut random);
        noisy(&paint(&world, &scene), 20.0, &mut random)
    };
    let images: Vec<RgbImage> = (0..500).map(|_| image()).collect();
    let start = Instant::now();
    let found: usize = images.iter().map(|image| reader.read(image).objects.len()).sum();
    let rate = images.len() as f64 / start.elapsed().as_secs_f64();
    println!("{rate:.0} images/s, {found} objects");
    assert!(rate >= 300.0, "{rate}");
}
