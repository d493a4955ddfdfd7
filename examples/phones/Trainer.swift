// Predicting and training with Kitestring's graphs in ONNX Runtime for iOS. Swift package
// https://github.com/microsoft/onnxruntime-swift-package-manager, product "onnxruntime".
import Foundation
import OnnxRuntimeBindings

enum Wrong: Error {
    case missing(inputs: [String])
    case notFloat32(String)
}

/// One session for each graph. Load and run it on a queue of your own, not on the main one.
final class Graph {
    let session: ORTSession
    let inputs: Set<String>
    let outputs: Set<String>

    init(path: String, environment: ORTEnv, threads: Int32 = 1) throws {
        let options = try ORTSessionOptions()
        try options.setIntraOpNumThreads(threads)
        session = try ORTSession(env: environment, modelPath: path, sessionOptions: options)
        inputs = Set(try session.inputNames())
        outputs = Set(try session.outputNames())
    }

    /// What is given and not an input is left out: a graph takes the weights that it reads.
    func run(_ given: [String: ORTValue]) throws -> [String: ORTValue] {
        let missing = inputs.subtracting(given.keys)
        guard missing.isEmpty else { throw Wrong.missing(inputs: missing.sorted()) }
        let taken = given.filter { inputs.contains($0.key) }
        return try session.run(withInputs: taken, outputNames: outputs, runOptions: nil)
    }
}

func tensor<T>(_ values: [T], _ type: ORTTensorElementDataType, _ shape: [Int]) throws -> ORTValue {
    let data = values.withUnsafeBytes { NSMutableData(bytes: $0.baseAddress, length: $0.count) }
    return try ORTValue(tensorData: data, elementType: type, shape: shape.map { NSNumber(value: $0) })
}

func floats(_ values: [Float], _ shape: [Int]) throws -> ORTValue { try tensor(values, .float, shape) }
func longs(_ values: [Int64], _ shape: [Int]) throws -> ORTValue { try tensor(values, .int64, shape) }
func bytes(_ values: [UInt8], _ shape: [Int]) throws -> ORTValue { try tensor(values, .uInt8, shape) }

/// The numbers of a float32 tensor, copied: the memory may be the tensor's own.
func numbers(_ value: ORTValue) throws -> [Float] {
    let data = try value.tensorData()
    return [Float](unsafeUninitializedCapacity: data.length / 4) { buffer, count in
        data.getBytes(buffer.baseAddress!, length: data.length)
        count = data.length / 4
    }
}

/// float32 arrays by name, from a .safetensors file.
func weights(_ file: URL) throws -> [String: ORTValue] {
    let whole = try Data(contentsOf: file, options: .mappedIfSafe)
    let length = Int(whole.prefix(8).enumerated().reduce(UInt64(0)) { $0 | UInt64($1.element) << (8 * UInt64($1.offset)) })
    let text = whole.subdata(in: 8..<(8 + length))
    let header = try JSONSerialization.jsonObject(with: text) as? [String: [String: Any]] ?? [:]
    var found: [String: ORTValue] = [:]
    for (name, about) in header where name != "__metadata__" {
        guard about["dtype"] as? String == "F32", let shape = about["shape"] as? [Int],
              let offsets = about["data_offsets"] as? [Int] else { throw Wrong.notFloat32(name) }
        let part = whole.subdata(in: (8 + length + offsets[0])..<(8 + length + offsets[1]))
        let values = [Float](unsafeUninitializedCapacity: part.count / 4) { buffer, count in
            count = part.copyBytes(to: buffer) / 4
        }
        found[name] = try floats(values, shape)
    }
    return found
}

/// Minibatch steps with a `step` graph. Weights stay in ONNX Runtime from step to step.
final class Trainer {
    private let graph: Graph
    private var held: [String: ORTValue]
    private var steps: Int64 = 0

    /// `start`: w:NAME -> its value. What an optimiser remembers of a weight has its shape, and is zero at first.
    init(_ graph: Graph, start: [String: ORTValue]) throws {
        self.graph = graph
        held = start.filter { graph.inputs.contains($0.key) }
        for name in graph.inputs where name.hasPrefix("memory:") {
            let weight = "w:" + name.drop { $0 != "." }.dropFirst()
            guard let value = start[weight] else { throw Wrong.missing(inputs: [weight]) }
            let shape = try value.tensorTypeAndShapeInfo().shape.map { $0.intValue }
            held[name] = try floats([Float](repeating: 0, count: shape.reduce(1, *)), shape)
        }
    }

    /// The loss. `rows`: x:COLUMN -> [n, ...]; `settings`: lr, momentum, ...; `draws`: draw:PLACE, of dropout.
    func step(_ rows: [String: ORTValue], settings: [String: Float], draws: [String: ORTValue] = [:]) throws -> Float {
        steps += 1
        var given = held.merging(rows) { $1 }.merging(draws) { $1 }
        for (name, value) in settings { given[name] = try floats([value], []) }
        given["step"] = try longs([steps], [])
        let found = try graph.run(given)
        for (name, value) in found where name.hasPrefix("next:") { held[String(name.dropFirst(5))] = value }
        return try numbers(found["loss"]!)[0]
    }

    /// The weights now: w:NAME -> its numbers.
    func weights() throws -> [String: [Float]] {
        try held.filter { $0.key.hasPrefix("w:") }.mapValues(numbers)
    }
}
