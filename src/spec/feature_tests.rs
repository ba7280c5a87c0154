//! Tests of what pipeline files can say beyond nodes and profiles: includes, references, the environment, axes that are
//! thinned, variants, conditions, paths; and that none of it, nor its form, changes a result that is the same.

use std::collections::BTreeMap;
use std::path::Path;

use deepgen_contract::id::{Fingerprint, NodeName};

use super::tests::{Project, fixtures, names, node, overrides, text_of};
use super::{Overrides, Resolved, Style, load, load_sweep, render};
use crate::plan::{ExternalFiles, Known, NodeRecord, Plan};

const PROMPTS: &str = "stage = \"prepare\"\nset = { source = { kind = \"prompts\", path = \"../p.txt\" } }\n";

fn resolved(files: &[(&str, &str)], overrides: &Overrides) -> Resolved {
    let project = Project::new(files);
    load(&project.path(files[0].0), overrides).unwrap_or_else(|problems| panic!("{}", project.text(&problems)))
}

fn problems(files: &[(&str, &str)]) -> String {
    Project::new(files).problems(files[0].0, &Overrides::default())
}

#[test]
fn included_files_lie_below_the_file_and_their_paths_are_their_own() {
    let main = "include = [\"../parts/nodes.toml\", \"../parts/more.toml\"]\n[pipeline]\nname = \"p\"\n\
                [node.a]\nset = { nominal_size = 7 }\n";
    let nodes =
        format!("[pipeline]\nname = \"below\"\nseed = 3\n[node.a]\nretries = 1\n{}", PROMPTS.replace("../p", "sets/p"));
    let more = "include = \"deeper/b.toml\"\n[node.a]\nset = { nominal_size = 5, dedupe = true }\n";
    let deeper = format!("[node.b]\n{PROMPTS}");
    let files = [
        ("pipelines/p.toml", main),
        ("parts/nodes.toml", &nodes),
        ("parts/more.toml", more),
        ("parts/deeper/b.toml", &deeper),
    ];
    let resolved = resolved(&files, &Overrides::default());
    assert_eq!((resolved.name.as_str(), resolved.seed, names(&resolved)), ("p", 3, vec!["a", "b"]));
    let a = node(&resolved, "a");
    assert_eq!(
        (a.retries, text_of(&a.settings, "/nominal_size"), text_of(&a.settings, "/dedupe")),
        (1, "7".into(), "true".into())
    );
    assert_eq!(text_of(&a.settings, "/source/path"), "\"parts/sets/p.txt\"");
    assert_eq!(text_of(&node(&resolved, "b").settings, "/source/path"), "\"parts/p.txt\"");
    assert_eq!(a.origins.get("source.path").unwrap().to_string(), "parts/nodes.toml:7");
}

#[test]
fn files_that_include_each_other_and_files_that_are_not_there_are_shown() {
    let one = "include = [\"two.toml\", \"parts/three.toml\", \"pipelines/two.toml\", 4]\n[pipeline]\nname = \"p\"\n";
    let files =
        [("pipelines/p.toml", one), ("pipelines/two.toml", "include = [\"p.toml\"]\n"), ("pipelines/thre.toml", "")];
    insta::assert_snapshot!(problems(&files));
}

#[test]
fn a_reference_takes_on_a_value_with_its_type() {
    let text = format!(
        "[pipeline]\nname = \"p\"\nseed = 9\n[env]\nSIZE = 12\nDATA = \"../sets\"\n\
         [node.a]\n{PROMPTS}[node.a.set.filters]\nmin_side = \"${{env.SIZE}}\"\n\
         [node.b]\nstage = \"prepare\"\nset = {{ source = \"${{a.source}}\", nominal_size = \"${{a.filters.min_side}}\", \
         filters = \"${{a.filters}}\" }}\n\
         [node.c]\nstage = \"prepare\"\nset.source = {{ kind = \"prompts\", path = \"${{env.DATA}}/$${{x}}-${{pipeline.seed}}-${{pipeline.profile}}.txt\" }}\n"
    )
    .replace("set = { source = { kind = \"prompts\", path = \"../p.txt\" } }", "set.source = { kind = \"prompts\", path = \"../p.txt\" }");
    let files = [("pipelines/p.toml", text.as_str())];
    let with = |env: &[(&str, &str)]| {
        let env = env.iter().map(|(name, value)| ((*name).to_owned(), (*value).to_owned())).collect();
        resolved(&files, &Overrides { env, ..Overrides::default() })
    };
    let plain = with(&[]);
    let b = node(&plain, "b");
    assert_eq!(text_of(&b.settings, "/nominal_size"), "12");
    assert_eq!(b.settings.to_value().unwrap()["source"], serde_json::json!({"kind": "prompts", "path": "p.txt"}));
    assert_eq!(text_of(&b.settings, "/filters/min_side"), "12");
    assert_eq!(text_of(&node(&plain, "c").settings, "/source/path"), "\"sets/${x}-9-tiny.txt\"");
    assert_eq!(plain.env, BTreeMap::from([("DATA".into(), "../sets".into()), ("SIZE".into(), "12".into())]));
    let other = with(&[("SIZE", "30"), ("DATA", "/mnt/sets"), ("UNKNOWN", "1")]);
    assert_eq!(text_of(&node(&other, "b").settings, "/nominal_size"), "30");
    assert_eq!(text_of(&node(&other, "c").settings, "/source/path"), "\"/mnt/sets/${x}-9-tiny.txt\"");
    assert_eq!(other.env["SIZE"], "30", "the value that was used is recorded");
}

#[test]
fn a_reference_means_the_instance_with_the_same_axis_values() {
    let text = format!(
        "[pipeline]\nname = \"p\"\n[node.a]\n{PROMPTS}over = {{ nominal_size = [1, 2] }}\n\
         [node.b]\nstage = \"mix\"\ninputs = {{ a = \"a\" }}\nset = {{ micro_batch = \"${{a.nominal_size}}\" }}\n\
         [node.c]\nstage = \"mix\"\ninputs = {{ a = \"a[2]\" }}\nset = {{ micro_batch = \"${{a[2].nominal_size}}\", \
         contamination.ngram = \"${{self-made.micro_batch}}\" }}\n\
         [node.self-made]\nstage = \"mix\"\ninputs = {{ a = \"a[1]\" }}\nset = {{ contamination.ngram = \"${{self-made.micro_batch}}\" }}\n"
    );
    let files = [("pipelines/p.toml", text.as_str())];
    let resolved = resolved(&files, &overrides(None, &["self-made.micro_batch=${a[1].nominal_size}"]));
    let batch = |name: &str| text_of(&node(&resolved, name).settings, "/micro_batch");
    assert_eq!([batch("b[1]"), batch("b[2]"), batch("c")], ["1", "2", "2"]);
    assert_eq!(text_of(&node(&resolved, "c").settings, "/contamination/ngram"), "1");
    assert_eq!(text_of(&node(&resolved, "self-made").settings, "/contamination/ngram"), "1");
}

#[test]
fn references_that_lead_nowhere_or_in_circles_are_shown() {
    let text = format!(
        "[pipeline]\nname = \"p\"\n[env]\nSIZE = \"many\"\nNEEDED = {{ type = \"whole\" }}\n[node.a]\n{}\
         over = {{ nominal_size = [1, 2] }}\n[node.b]\nstage = \"mix\"\n\
         inputs = {{ a = \"a[1]\" }}\nset = {{ micro_batch = \"${{a.nominal_size}}\", sampling = \"${{c.sampling}}\", \
         cycle = {{ edit = \"${{env.SIZE}}\", generation = \"${{env.SIZES}}\" }}, contamination = \"${{a.filter}}\" }}\n\
         [node.c]\nstage = \"mix\"\ninputs = {{ a = \"a[1]\" }}\nset = {{ sampling = \"${{b.sampling}}\", \
         micro_batch = \"${{d.x}}\", cycle.edit = \"${{a[1].filters}} x\", cycle.generation = \"${{pipeline.sed}}\", \
         contamination.ngram = \"${{env.NEEDED\" }}\n",
        PROMPTS
    );
    insta::assert_snapshot!(problems(&[("pipelines/p.toml", &text)]));
}

#[test]
fn axes_advance_together_and_combinations_are_left_out() {
    let text = "[pipeline]\nname = \"p\"\n[node.a]\nstage = \"prepare\"\nset = { source.kind = \"prompts\" }\n\
         over = { source.path = [\"x.txt\", \"y.txt\"], nominal_size = [1, 2], dedupe = [false, true] }\n\
         zip = [[\"source.path\", \"nominal_size\"]]\nexclude = [{ source.path = \"y.txt\", dedupe = true }]\n\
         [node.b]\nstage = \"mix\"\ninputs = { a = \"a\" }\nexclude = [{ dedupe = true }]\n\
         [node.c]\nstage = \"mix\"\ninputs = { a = \"a[y.txt]\" }\n";
    let resolved = resolved(&[("pipelines/p.toml", text)], &Overrides::default());
    let expected =
        ["a[x.txt,false]", "a[x.txt,true]", "a[y.txt,false]", "b[x.txt,false]", "b[y.txt,false]", "c[false]"];
    assert_eq!(names(&resolved), expected);
    assert_eq!(text_of(&node(&resolved, "a[y.txt,false]").settings, "/nominal_size"), "2");
}

#[test]
fn a_grid_of_an_experiment_is_zipped_and_thinned() {
    let text = "pipeline = \"../pipelines/full.toml\"\nzip = [[\"sft.optimizer.lr\", \"sft.train.max_iters\"]]\n\
                exclude = [{ \"sft.optimizer.lr\" = 2e-4, pipeline.seed = [1, 3] }]\n\
                [axes]\n\"sft.optimizer.lr\" = [1e-4, 2e-4]\nsft.train.max_iters = [10, 20]\n\"pipeline.seed\" = [1, 2, 3]\n";
    let pipeline = std::fs::read_to_string(fixtures().join("pipelines/full.toml")).unwrap();
    let project = Project::new(&[("experiments/grid.toml", text), ("pipelines/full.toml", &pipeline)]);
    let resolved = load_sweep(&project.path("experiments/grid.toml"), &Overrides::default()).unwrap();
    let sweep = resolved.sweep.as_ref().unwrap();
    let names: Vec<&str> = sweep.variants.iter().map(|variant| variant.name.as_str()).collect();
    assert_eq!(names, ["lr=0.0001, seed=1", "lr=0.0001, seed=2", "lr=0.0001, seed=3", "lr=0.0002, seed=2"]);
    let sft = resolved.node(&NodeName("sft@lr=0.0002, seed=2".into())).unwrap();
    assert_eq!(text_of(&sft.settings, "/train/max_iters"), "20");
}

const WITH_VARIANTS: &str = "[variant.\"w/o SCB\"]\ndescription = \"the last layer alone\"\n\
    set = { \"pretrain.model.bridge.layers\" = \"last\", \"sft.model.bridge.layers\" = \"last\" }\n\
    [variant.both]\nextends = \"w/o SCB\"\n[variant.both.node.sft]\nset = { model.lora = { kind = \"none\" } }\nretries = 5\n\
    [variant.one-image.node.images]\nover = { benchmark = [\"geneval\"] }\n";

fn with_variants() -> String {
    std::fs::read_to_string(fixtures().join("pipelines/full.toml"))
        .unwrap()
        .replace("[node.\"images[cvtg]\"]\nset = { items.path = \"../data/cvtg.txt\" }\n", "")
        + WITH_VARIANTS
}

#[test]
fn a_variant_is_a_diff_for_the_command_line_and_for_experiments() {
    let pipeline = with_variants();
    let experiment = "pipeline = \"../pipelines/full.toml\"\n[[variant]]\nname = \"plain\"\n[[variant]]\nname = \"ours\"\n\
                      use = \"w/o SCB\"\nset = { \"sft.optimizer.lr\" = 1e-5 }\n";
    let files = [("pipelines/full.toml", pipeline.as_str()), ("experiments/e.toml", experiment)];
    let with = |names: &[&str]| {
        let variants = names.iter().map(|&name| name.to_owned()).collect();
        resolved(&files, &Overrides { variants, ..Overrides::default() })
    };
    let layers = |resolved: &Resolved| text_of(&node(resolved, "sft").settings, "/model/bridge/layers");
    let lora = |resolved: &Resolved| text_of(&node(resolved, "sft").settings, "/model/lora/kind");
    let (plain, one, two) = (with(&[]), with(&["w/o SCB"]), with(&["both"]));
    assert_eq!(
        (layers(&plain) == "\"last\"", layers(&one) == "\"last\"", layers(&two) == "\"last\""),
        (false, true, true)
    );
    assert_eq!((lora(&one), lora(&two), node(&two, "sft").retries), ("\"adapters\"".into(), "\"none\"".into(), 5));
    assert_eq!(two.variants, ["both"]);
    assert!(names(&with(&["one-image", "both"])).iter().all(|name| !name.contains("cvtg")));

    let project = Project::new(&files);
    let sweep = load_sweep(&project.path("experiments/e.toml"), &Overrides::default()).unwrap();
    let sft = sweep.node(&NodeName("sft@ours".into())).unwrap();
    assert_eq!(text_of(&sft.settings, "/model/bridge/layers"), "\"last\"");
    assert_eq!(text_of(&sft.settings, "/optimizer/lr"), "0.00001");
}

#[test]
fn a_node_whose_condition_does_not_hold_vanishes_with_what_cannot_do_without_it() {
    let text = format!(
        "[pipeline]\nname = \"p\"\n[env]\nEXTRA = false\n[node.a]\n{PROMPTS}\
         [node.b]\n{PROMPTS}when = {{ env.EXTRA = true }}\n\
         [node.c]\n{PROMPTS}when = {{ any = [{{ profile = [\"small\", \"paper\"] }}, {{ a.nominal_size = 5 }}] }}\n\
         [node.mixed]\nstage = \"mix\"\ninputs = {{ a = \"a\", b = \"b\" }}\nset = {{ members.b.weight = 2.0 }}\nneeds = [\"c\"]\n\
         [node.gone]\nstage = \"mix\"\ninputs = {{ b = \"b\", c = \"c\" }}\n\
         [node.base]\nstage = \"import\"\nwhen = {{ not = {{ profile = \"shapes\" }} }}\n\
         [node.train]\nstage = \"pretrain\"\ninputs = {{ weights = \"base\", data = \"mixed\" }}\n\
         [node.after]\nstage = \"handoff\"\ninputs = {{ weights = \"base\", checkpoint = \"train\" }}\n\
         [profile.small.node.a]\nset = {{ nominal_size = 5 }}\n[profile.small.node.c]\nwhen = false\n"
    );
    let files = [("pipelines/p.toml", text.as_str())];
    let tiny = resolved(&files, &Overrides::default());
    assert_eq!(names(&tiny), ["a", "mixed"]);
    let mixed = node(&tiny, "mixed");
    assert_eq!((mixed.inputs.len(), mixed.needs.len()), (1, 0));
    assert_eq!(text_of(&mixed.settings, "/members"), "{}");
    let reasons: Vec<String> = tiny.left_out.iter().map(|(name, reason)| format!("{name}: {reason}")).collect();
    insta::assert_snapshot!(reasons.join("\n"));
    let set = resolved(&files, &overrides(Some("paper"), &["a.nominal_size=5"]));
    assert_eq!(names(&set), ["a", "c", "mixed", "gone", "base", "train", "after"]);
    let env = BTreeMap::from([("EXTRA".to_owned(), "true".to_owned())]);
    let small = resolved(&files, &Overrides { env, profile: Some("small".into()), ..Overrides::default() });
    assert_eq!(names(&small), ["a", "b", "mixed", "gone"]);
    assert_eq!(node(&small, "gone").inputs.len(), 1);
}

#[test]
fn the_papers_profile_has_no_images_of_a_base_without_text_encoder() {
    let file = Path::new("pipelines/full.toml");
    let base = |profile| {
        let resolved = load(file, &overrides(profile, &[])).unwrap();
        let nodes = names(&resolved).into_iter().filter(|name| name.contains("-base")).map(str::to_owned);
        nodes.collect::<Vec<_>>()
    };
    assert_eq!(base(Some("paper")), Vec::<String>::new());
    for profile in [None, Some("small"), Some("micro")] {
        assert_eq!(base(profile).len(), 6, "{profile:?}");
    }
}

/// A disk on which every path holds its name.
struct Disk;

impl ExternalFiles for Disk {
    fn content_hash(&self, path: &str) -> Option<String> {
        Some(path.to_owned())
    }
}

struct Nothing;

impl Known for Nothing {
    fn is_sealed(&self, _: &Fingerprint) -> bool {
        false
    }

    fn latest(&self, _: &NodeName) -> Option<NodeRecord> {
        None
    }
}

fn fingerprints(project: &Project, file: &str) -> BTreeMap<String, String> {
    let resolved = load(&project.path(file), &Overrides::default());
    let resolved = resolved.unwrap_or_else(|problems| panic!("{}", render(&problems, Style::Plain)));
    let plan = Plan::build(&resolved, &Nothing, &Disk);
    plan.nodes.iter().map(|planned| (planned.node.name.0.clone(), planned.fingerprint.to_string())).collect()
}

fn pipeline() -> String {
    std::fs::read_to_string(fixtures().join("pipelines/full.toml")).unwrap()
}

/// Asserts that a pipeline in other files has the fingerprints of the fixture's.
fn same(file: &str, files: &[(&str, &str)]) {
    let plain = Project::new(&[("pipelines/full.toml", &pipeline())]);
    let changed = Project::new(files);
    assert_eq!(fingerprints(&plain, "pipelines/full.toml"), fingerprints(&changed, file));
}

#[test]
fn comments_and_formatting_change_no_fingerprint() {
    let noisy: String = pipeline().lines().map(|line| format!("  {line}   # why\n\n")).collect();
    let noisy = noisy.replace(" = ", "  =   ").replace("4e-4", "0.000_4").replace("1.0", "1.00");
    same("pipelines/full.toml", &[("pipelines/full.toml", &noisy)]);
}

#[test]
fn the_order_of_keys_and_tables_changes_no_fingerprint() {
    let text = pipeline();
    let mut blocks: Vec<&str> = text.split("\n\n").collect();
    blocks.reverse();
    let reversed =
        blocks.join("\n\n").replace("{ weights = \"base\", data = \"mix\" }", "{ data = \"mix\", weights = \"base\" }");
    same("pipelines/full.toml", &[("pipelines/full.toml", &reversed)]);
}

#[test]
fn a_pipeline_file_that_moves_changes_no_fingerprint() {
    let moved = pipeline().replace("\"../data", "\"../../data");
    same("pipelines/old/renamed.toml", &[("pipelines/old/renamed.toml", &moved)]);
}

#[test]
fn a_pipeline_cut_into_included_files_has_the_same_fingerprints() {
    let text = pipeline();
    let (head, tail) = text.split_at(text.find("[node.sft]").unwrap());
    let head = format!("include = [\"parts/tail.toml\"]\n{head}");
    let tail = tail.replace("\"../data", "\"../../data");
    same("pipelines/full.toml", &[("pipelines/full.toml", &head), ("pipelines/parts/tail.toml", &tail)]);
}

#[test]
fn an_unused_stage_file_changes_no_fingerprint() {
    let other = std::fs::read_to_string(fixtures().join("stages/sft.toml")).unwrap();
    same(
        "pipelines/full.toml",
        &[("pipelines/full.toml", &pipeline()), ("stages/unused.toml", &other), ("stages/broken.toml", "kind =")],
    );
}

#[test]
fn a_setting_written_as_a_reference_or_at_its_default_changes_no_fingerprint() {
    let text = pipeline().replace("optimizer.lr = 4e-4", "optimizer.lr = \"${env.LR}\"") + "\n[env]\nLR = 4e-4\n";
    let text = text.replace("retries = 2", "retries = 2\ntimeout = \"3h\"\npriority = 4\nneeds = [\"captions\"]");
    same("pipelines/full.toml", &[("pipelines/full.toml", &text)]);
}

#[test]
fn a_project_without_stage_files_has_the_built_in_ones_and_a_file_of_its_own_stands_in_place_of_one() {
    let folder = tempfile::tempdir().unwrap();
    let path = |name: &str| folder.path().join(name);
    std::fs::create_dir_all(path("pipelines")).unwrap();
    let text = "[pipeline]\nname = \"p\"\n[node.base]\nstage = \"import\"\n[node.w]\nstage = \"prepare\"\n\
                set = { source = { kind = \"prompts\", path = \"../w.txt\" } }\n";
    std::fs::write(path("pipelines/p.toml"), text).unwrap();
    let built_in = load(&path("pipelines/p.toml"), &Overrides::default()).unwrap();
    assert_eq!(built_in.root, folder.path());
    assert_eq!(text_of(&node(&built_in, "w").settings, "/filters/min_side"), "15");
    assert_eq!(text_of(&node(&built_in, "base").settings, "/path"), "\"stages/base/shapes\"");
    assert!(
        node(&built_in, "w")
            .origins
            .get("filters.min_side")
            .unwrap()
            .to_string()
            .starts_with("built-in stages/prepare.toml:")
    );

    std::fs::create_dir(path("stages")).unwrap();
    let own = include_str!("../../stages/prepare.toml").replace("min_side = 15", "min_side = 9");
    std::fs::write(path("stages/prepare.toml"), own).unwrap();
    let mixed = load(&path("pipelines/p.toml"), &Overrides::default()).unwrap();
    assert_eq!(text_of(&node(&mixed, "w").settings, "/filters/min_side"), "9");
    assert_eq!(node(&mixed, "base").settings, node(&built_in, "base").settings);
}

/// Nodes that the examples of docs/pipeline.md read.
const COMMON: &str = "[pipeline]\nname = \"common\"\n[node.words]\nstage = \"prepare\"\n\
    set.source = { kind = \"prompts\", path = \"../words.txt\" }\n[node.mix]\nstage = \"mix\"\ninputs = { words = \"words\" }\n\
    [node.base]\nstage = \"import\"\n[variant.shuffled]\nset = { \"mix.sampling\" = \"sample_proportional\" }\n";

#[test]
fn every_example_of_the_reference_is_without_a_problem() {
    let text = include_str!("../../docs/pipeline.md");
    let blocks: Vec<&str> = text.split("```toml\n").skip(1).map(|rest| rest.split("```").next().unwrap()).collect();
    assert!(blocks.len() >= 10, "{} examples", blocks.len());
    for (at, block) in blocks.iter().enumerate() {
        let is_whole = ["kind =", "pipeline =", "include ="].iter().any(|first| block.starts_with(first));
        let header = if block.contains("[pipeline]") || is_whole { "" } else { "include = [\"common.toml\"]\n" };
        let file = format!("pipelines/example-{at}.toml");
        let example = format!("{header}{block}");
        let project = Project::new(&[("pipelines/common.toml", COMMON), (&file, &example)]);
        let problems = super::check(&project.path(&file), &Overrides::default());
        assert!(problems.is_empty(), "{block}\n{}", project.text(&problems));
    }
}
