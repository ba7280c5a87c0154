//! `deepgen-worker parity` on the public cases, and on cases that are broken on purpose.

use std::path::{Path, PathBuf};
use std::process::{Command, Output};

fn fixtures() -> PathBuf {
    PathBuf::from("../../tests/fixtures/parity")
}

fn parity(folder: &Path, options: &[&str]) -> Output {
    let mut command = Command::new(env!("CARGO_BIN_EXE_deepgen-worker"));
    command.arg("parity").arg(folder).args(options).output().unwrap()
}

fn text(output: &Output) -> String {
    format!("{}{}", String::from_utf8_lossy(&output.stdout), String::from_utf8_lossy(&output.stderr))
}

/// Copies a case, which a test then breaks.
fn copy(case: &str) -> (tempfile::TempDir, PathBuf) {
    let folder = tempfile::tempdir().unwrap();
    let target = folder.path().join(case);
    copy_folder(&fixtures().join(case), &target);
    (folder, target)
}

fn copy_folder(from: &Path, to: &Path) {
    std::fs::create_dir_all(to).unwrap();
    for entry in std::fs::read_dir(from).unwrap() {
        let path = entry.unwrap().path();
        let target = to.join(path.file_name().unwrap());
        if path.is_dir() { copy_folder(&path, &target) } else { std::fs::copy(&path, &target).map(|_| ()).unwrap() }
    }
}

/// Changes the bytes of a safetensors file's header, or of its tensors.
fn edit(path: &Path, f: impl FnOnce(String, &mut Vec<u8>) -> String) {
    let bytes = std::fs::read(path).unwrap();
    let length = u64::from_le_bytes(bytes[..8].try_into().unwrap()) as usize;
    let header = String::from_utf8(bytes[8..8 + length].to_vec()).unwrap();
    let mut data = bytes[8 + length..].to_vec();
    let header = f(header, &mut data);
    let mut all = (header.len() as u64).to_le_bytes().to_vec();
    all.extend(header.into_bytes());
    all.extend(data);
    std::fs::write(path, all).unwrap();
}

#[test]
fn every_public_case_passes() {
    let output = parity(&fixtures(), &[]);
    let text = text(&output);
    let failures: Vec<&str> = text.lines().filter(|line| line.starts_with("FAIL")).collect();
    assert!(output.status.success(), "{}", failures.join("\n"));
    assert!(text.contains("19 of 19 cases pass"), "{}", text.lines().last().unwrap_or_default());
}

#[test]
fn one_case_is_found_by_name_or_as_the_folder_itself() {
    let by_name = parity(&fixtures(), &["--case", "connector"]);
    let as_folder = parity(&fixtures().join("connector"), &[]);
    assert!(by_name.status.success() && as_folder.status.success());
    assert_eq!(by_name.stdout, as_folder.stdout);
    let missing = parity(&fixtures(), &["--case", "conector"]);
    assert_eq!(missing.status.code(), Some(2));
    assert!(text(&missing).contains("connector"), "{}", text(&missing));
}

#[test]
fn a_changed_number_fails_its_line_alone() {
    let (_folder, case) = copy("connector");
    edit(&case.join("outputs.safetensors"), |header, data| {
        // The exponent of one float.
        data[3] ^= 0x02;
        header
    });
    let output = parity(&case, &["--json"]);
    assert_eq!(output.status.code(), Some(1));
    let stdout = String::from_utf8(output.stdout).unwrap();
    let outcome: serde_json::Value = serde_json::from_str(stdout.lines().next().unwrap()).unwrap();
    let failed = outcome["lines"].as_array().unwrap().iter().filter(|line| line["passed"] == false).count();
    assert_eq!(failed, 1, "{stdout}");
}

#[test]
fn missing_and_unexpected_tensors_are_errors() {
    let (_folder, case) = copy("connector");
    edit(&case.join("outputs.safetensors"), |header, _| header.replace("\"pooled\"", "\"pooked\""));
    let output = parity(&case, &[]);
    assert_eq!(output.status.code(), Some(1));
    assert!(text(&output).contains("no tensor `pooled`"), "{}", text(&output));

    let (_folder, case) = copy("sd3_vae");
    edit(&case.join("grads.safetensors"), |header, _| header.replace("encoder.conv_out.bias", "encoder.conv_out.hias"));
    assert_eq!(parity(&case, &[]).status.code(), Some(1));
}

#[test]
fn a_missing_file_and_an_unknown_kind_are_errors() {
    let (_folder, case) = copy("connector");
    std::fs::remove_file(case.join("grads.safetensors")).unwrap();
    let output = parity(&case, &[]);
    assert_eq!(output.status.code(), Some(1));
    assert!(text(&output).contains("grads.safetensors"), "{}", text(&output));

    std::fs::write(case.join("config.json"), r#"{"case": "conector"}"#).unwrap();
    let output = parity(&case, &[]);
    assert_eq!(output.status.code(), Some(1));
    assert!(text(&output).contains("`conector` is not known"), "{}", text(&output));
}

#[test]
fn a_wrong_command_line_says_how_it_is_called() {
    for options in [vec!["--cases"], vec!["--case"], vec!["other"], vec!["--device", "gpu"]] {
        let output = parity(&fixtures(), &options);
        assert_eq!(output.status.code(), Some(2), "{options:?}");
    }
}
