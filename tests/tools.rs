//! The commands outside of pipelines with the real worker: images and the way back from them, weights out and in again.
//!
//! Ignored by default, as `e2e` is, and run with it by `make test-e2e`. The weights are those of the shapes world's base.

use std::path::{Path, PathBuf};
use std::process::{Command, Output, Stdio};

const BASE: &str = "stages/base/shapes";

fn deepgen(arguments: &[&str]) -> Output {
    let bin = std::env::var("DEEPGEN_E2E_BIN").expect("run this through `make test-e2e`");
    let mut command = Command::new(Path::new(&bin).join("deepgen"));
    command.args(arguments).stdin(Stdio::null()).output().expect("deepgen starts")
}

fn succeed(arguments: &[&str]) -> String {
    let output = deepgen(arguments);
    assert!(output.status.success(), "{arguments:?}: {}", String::from_utf8_lossy(&output.stderr));
    String::from_utf8_lossy(&output.stdout).into_owned()
}

fn text(path: &Path) -> &str {
    path.to_str().expect("temporary folders have plain names")
}

fn pixels(path: &Path) -> Vec<u8> {
    image::open(path).expect("a picture").to_rgb8().into_raw()
}

#[test]
#[ignore = "needs release builds: make test-e2e"]
fn an_image_is_made_again_from_its_own_file() {
    let dir = tempfile::tempdir().unwrap();
    let (out, prompts) = (dir.path().join("out"), dir.path().join("prompts.txt"));
    std::fs::write(&prompts, "a red circle at the top left\n\na blue square and a small green triangle\n").unwrap();
    let listed = succeed(&[
        "generate",
        "--weights",
        BASE,
        "--prompts",
        text(&prompts),
        "--count",
        "2",
        "--batch",
        "3",
        "--steps",
        "3",
        "--seed",
        "7",
        "--negative",
        "a word",
        "--out",
        text(&out),
        "--grid",
    ]);
    let paths: Vec<PathBuf> = listed.lines().map(PathBuf::from).collect();
    assert_eq!(paths.len(), 5, "four images and a grid: {listed}");
    let grid = image::open(out.join("grid.png")).unwrap();
    assert_eq!((grid.width(), grid.height()), (4 * 32, 32));
    let images: Vec<Vec<u8>> = paths[..4].iter().map(|path| pixels(path)).collect();
    assert!(images[0] != images[1] && images[1] != images[2], "every image has a noise of its own");

    for (number, expected) in images.iter().enumerate() {
        let again = dir.path().join(format!("again-{number}.png"));
        succeed(&["generate", "--from", text(&paths[number]), "--out", text(&again)]);
        assert_eq!(&pixels(&again), expected, "image {number}");
    }

    // Other weights are refused, by their hash.
    let other = dir.path().join("other");
    succeed(&["import-weights", BASE, "--out", text(&other), "--dtype", "f32"]);
    let refused = deepgen(&["generate", "--weights", text(&other), "--from", text(&paths[0])]);
    assert_eq!(refused.status.code(), Some(2));
    assert!(String::from_utf8_lossy(&refused.stderr).contains("other weights"));
}

#[test]
#[ignore = "needs release builds: make test-e2e"]
fn weights_go_out_as_the_released_folders_and_come_in_again() {
    let dir = tempfile::tempdir().unwrap();
    let [out, back] = ["out", "back"].map(|name| dir.path().join(name));
    succeed(&["export", "--weights", BASE, "--layout", "diffusers", "--out", text(&out)]);
    succeed(&["import-weights", text(&out), "--out", text(&back)]);
    for part in ["transformer.safetensors", "vae.safetensors", "vlm.safetensors"] {
        let sizes = [Path::new(BASE), &back].map(|folder| std::fs::metadata(folder.join(part)).unwrap().len());
        // Headers differ by a line of metadata and by the order of tensors.
        assert!(sizes[0].abs_diff(sizes[1]) < 64, "{part}: {sizes:?}");
    }
    let refused = deepgen(&["export", "--weights", BASE, "--layout", "peft", "--out", text(&dir.path().join("peft"))]);
    assert_eq!(refused.status.code(), Some(2));
    assert!(String::from_utf8_lossy(&refused.stderr).contains("no adapters"));
    let refused = deepgen(&["generate", "--weights", BASE, "--prompt", "x", "--size", "33"]);
    assert!(String::from_utf8_lossy(&refused.stderr).contains("multiples of 8"), "{refused:?}");
}
