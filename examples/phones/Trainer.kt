// Predicting and training with Kitestring's graphs in ONNX Runtime for Android:
//   implementation("com.microsoft.onnxruntime:onnxruntime-android:1.27.0")
package kitestring.example

import ai.onnxruntime.OnnxTensor
import ai.onnxruntime.OnnxTensorLike
import ai.onnxruntime.OrtEnvironment
import ai.onnxruntime.OrtSession
import ai.onnxruntime.TensorInfo
import org.json.JSONObject
import java.io.File
import java.io.RandomAccessFile
import java.nio.ByteBuffer
import java.nio.ByteOrder
import java.nio.channels.FileChannel

private val environment = OrtEnvironment.getEnvironment()

/** One session for each graph and process: it may be run from several threads. Load it off the main thread. */
fun load(graph: File, threads: Int = 1): OrtSession =
    OrtSession.SessionOptions().use { options ->
        options.setIntraOpNumThreads(threads)
        environment.createSession(graph.path, options)
    }

fun floats(values: FloatArray, vararg shape: Long): OnnxTensor {
    val buffer = ByteBuffer.allocateDirect(4 * values.size).order(ByteOrder.nativeOrder()).asFloatBuffer()
    buffer.put(values).rewind()
    return OnnxTensor.createTensor(environment, buffer, shape)
}

fun longs(values: LongArray, vararg shape: Long): OnnxTensor {
    val buffer = ByteBuffer.allocateDirect(8 * values.size).order(ByteOrder.nativeOrder()).asLongBuffer()
    buffer.put(values).rewind()
    return OnnxTensor.createTensor(environment, buffer, shape)
}

/** The numbers of a float32 tensor, copied. */
fun numbers(tensor: OnnxTensor): FloatArray {
    val buffer = tensor.floatBuffer
    return FloatArray(buffer.remaining()).also { buffer.get(it) }
}

/** float32 arrays by name; the file is mapped, not read. */
fun weights(file: File): Map<String, OnnxTensor> = RandomAccessFile(file, "r").use { open ->
    val whole = open.channel.map(FileChannel.MapMode.READ_ONLY, 0, open.length()).order(ByteOrder.LITTLE_ENDIAN)
    val length = whole.getLong(0).toInt()
    val text = ByteArray(length).also { whole.position(8); whole.get(it) }
    val header = JSONObject(String(text, Charsets.UTF_8))
    header.keys().asSequence().filter { it != "__metadata__" }.associate { name ->
        val about = header.getJSONObject(name)
        require(about.getString("dtype") == "F32") { "$name is not float32" }
        val shape = about.getJSONArray("shape").let { s -> LongArray(s.length()) { s.getLong(it) } }
        val offsets = about.getJSONArray("data_offsets")
        whole.limit(8 + length + offsets.getInt(1)).position(8 + length + offsets.getInt(0))
        val values = FloatArray((offsets.getInt(1) - offsets.getInt(0)) / 4)
        whole.slice().order(ByteOrder.LITTLE_ENDIAN).asFloatBuffer().get(values)
        whole.clear()
        name to floats(values, *shape)
    }
}

/** What a `predict` graph gives: an output's name -> its numbers. `rows`: x:COLUMN -> [n, ...]. */
fun predict(graph: OrtSession, weights: Map<String, OnnxTensor>, rows: Map<String, OnnxTensor>): Map<String, FloatArray> =
    graph.run(taken(weights + rows, graph)).use { found ->
        found.associate { (name, value) -> name to numbers(value as OnnxTensor) }
    }

private fun taken(given: Map<String, OnnxTensor>, graph: OrtSession): Map<String, OnnxTensorLike> =
    given.filterKeys { it in graph.inputNames }

/** Minibatch steps with a `step` graph. Weights stay in ONNX Runtime from step to step. */
class Trainer(private val graph: OrtSession, start: Map<String, OnnxTensor>) : AutoCloseable {
    private val held: MutableMap<String, OnnxTensor> = start.filterKeys { it in graph.inputNames }.toMutableMap()
    private val moving = graph.outputNames.filter { it.startsWith("next:") }
    private var last: OrtSession.Result? = null
    private var steps = 0L

    init {
        for (name in graph.inputNames.filter { it.startsWith("memory:") }) {
            val shape = (graph.inputInfo.getValue(name).info as TensorInfo).shape
            held[name] = floats(FloatArray(shape.fold(1L, Long::times).toInt()), *shape)
        }
    }

    /** The loss. `rows`: x:COLUMN -> [n, ...]; `settings`: lr, momentum, ...; `draws`: draw:PLACE, of dropout. */
    fun step(rows: Map<String, OnnxTensor>, settings: Map<String, Float>, draws: Map<String, OnnxTensor> = emptyMap()): Float {
        steps += 1
        val scalars = settings.mapValues { (_, value) -> floats(floatArrayOf(value)) } + ("step" to longs(longArrayOf(steps)))
        val missing = graph.inputNames - held.keys - rows.keys - scalars.keys - draws.keys
        require(missing.isEmpty()) { "the graph also takes $missing" }
        val found = graph.run(taken(held + rows + scalars + draws, graph))
        for (name in moving) held[name.removePrefix("next:")] = found.get(name).get() as OnnxTensor
        last?.close()  // its tensors were this step's inputs
        last = found
        scalars.values.forEach(OnnxTensor::close)
        return numbers(found.get("loss").get() as OnnxTensor)[0]
    }

    /** The weights now, copied: w:NAME -> its numbers. */
    fun weights(): Map<String, FloatArray> = held.filterKeys { it.startsWith("w:") }.mapValues { (_, tensor) -> numbers(tensor) }

    override fun close() {
        last?.close()
    }
}
