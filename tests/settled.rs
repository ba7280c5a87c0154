//! A pipeline that is all done is told so at once, and never when anything it was decided from has changed.

mod harness;

use std::fs;

use harness::Project;

/// A project that was run and then asked once more.
fn settled() -> Project {
    let project = Project::new();
    project.run().expect(0).prints("6 ran, 0 cached");
    project.run().expect(0).prints("0 ran, 6 cached");
    assert_eq!(fs::read_dir(project.path("artifacts/state/settled")).unwrap().count(), 1);
    project
}

fn num_runs(project: &Project) -> usize {
    fs::read_dir(project.path("artifacts/runs")).unwrap().count()
}

#[test]
fn asking_again_opens_no_run_and_names_the_report_of_the_first() {
    let project = settled();
    let before = num_runs(&project);
    let ran = project.run().expect(0).prints("0 ran, 6 cached").prints("report.html");
    assert_eq!((before, num_runs(&project)), (1, 1), "{}", ran.stdout);
    let plan = project.deepgen(&["plan", "pipelines/small.toml"]).expect(0);
    let again = project.deepgen(&["plan", "pipelines/small.toml"]).expect(0).prints("6 cached, 0 to run");
    assert_eq!(plan.stdout, again.stdout);
}

#[test]
fn whatever_it_was_decided_from_counts() {
    type Change = fn(&Project);
    let changes: [(&str, Change, &str); 7] = [
        ("external content", |p| p.write("data/words.txt", "another line\n"), "4 ran, 2 cached"),
        ("a setting", |p| p.edit("pipelines/small.toml", "seed = 7", "seed = 8"), "6 ran, 0 cached"),
        ("a stage file", |p| p.edit("stages/sft.toml", "lr = 5e-5", "lr = 6e-5"), "2 ran, 4 cached"),
        ("a comment", |p| p.edit("pipelines/small.toml", "seed = 7", "seed = 7 # lucky"), "0 ran, 6 cached"),
        ("a result that has gone", remove_a_result, "1 ran, 5 cached"),
        ("a file of a result cut short", cut_a_result, "1 ran, 5 cached"),
        ("the memory itself", damage_the_memory, "0 ran, 6 cached"),
    ];
    for (name, change, expected) in changes {
        let project = settled();
        change(&project);
        let ran = project.run().expect(0);
        assert!(ran.stdout.contains(expected), "after a change of {name}:\n{}{}", ran.stdout, ran.stderr);
        project.run().expect(0).prints("0 ran, 6 cached");
    }
}

/// Returns the folder of the hand-off's result, which nothing reads.
fn last_result(project: &Project) -> std::path::PathBuf {
    let fingerprint = project.manifests()["final"]["fingerprint"].as_str().unwrap().to_owned();
    project.path("artifacts/store").join(fingerprint)
}

fn remove_a_result(project: &Project) {
    fs::remove_dir_all(last_result(project)).unwrap();
}

fn cut_a_result(project: &Project) {
    let file = last_result(project).join("parts/result.txt");
    fs::remove_file(&file).unwrap();
    fs::write(&file, "").unwrap();
}

fn damage_the_memory(project: &Project) {
    for folder in ["artifacts/state/settled", "artifacts/state"] {
        for entry in fs::read_dir(project.path(folder)).unwrap().map(|entry| entry.unwrap().path()) {
            if entry.extension().is_some_and(|end| end == "json") {
                fs::write(entry, "{\"version\":1,\"results\":").unwrap();
            }
        }
    }
}

#[test]
fn another_word_on_the_command_line_is_another_question() {
    let project = settled();
    project
        .deepgen(&["run", "pipelines/small.toml", "--set", "sft.optimizer.lr=1e-3"])
        .expect(0)
        .prints("2 ran, 4 cached");
    project.deepgen(&["run", "pipelines/small.toml", "--to", "mix"]).expect(0).prints("0 ran, 3 cached");
    project.deepgen(&["run", "pipelines/small.toml", "--force", "final"]).expect(0).prints("1 ran, 5 cached");
    project.deepgen(&["run", "pipelines/small.toml", "--force", "final"]).expect(0).prints("1 ran, 5 cached");
    project.run().expect(0).prints("0 ran, 6 cached");
}
