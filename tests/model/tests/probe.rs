//! x
use petra_model::*;
#[test]
fn probe() {
    let which: usize = std::env::var("W").unwrap().parse().unwrap();
    let all: Vec<_> = petra_model::configurations::SMALL
        .into_iter()
        .chain(petra_model::configurations::LARGE)
        .collect();
    let mut config = all[which];
    if let Ok(n) = std::env::var("N") {
        config.collectors = n.parse().unwrap();
    }
    if let Ok(n) = std::env::var("C") {
        config.clones = n.parse().unwrap();
    }
    let model = Model::new(config);
    let t = std::time::Instant::now();
    let e = explore(model, &Property::ALL);
    println!("{}: {} states depth {} {:?}", config.name, e.states, e.depth, t.elapsed());
    if let Some(v) = e.violation {
        println!("{v:?}");
    }
}
